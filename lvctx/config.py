"""Configurations: how a dataclass field appears on the command line, and which fields identify a run.

A field's name, type, default and docstring already describe its option; `Flag` adds what they cannot express. No
heavy module is imported here, since the command line reads these classes to print help.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from math import isfinite
from typing import Annotated, Any, get_type_hints

from lvctx.errors import UsageError

OnProgress = Callable[[int, int, str], None]
"""Progress of a job: (done, total, note); a total of 0 means that it is not known."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Marks a field, as in `out: Annotated[Path, Flag(names=("-o", "--out"))]`."""

    names: tuple[str, ...] = ()
    """Names of the option. Default: `--field-name`, and `--no-field-name` for a bool that is True by default."""
    argument: bool = False
    """A positional argument instead of an option."""
    metavar: str | None = None
    """What the help shows for the value."""
    parse: Callable[[str], Any] | None = None
    """Turns the option's text into the field's value; raises ValueError with a sentence that states what to write."""
    min: float | None = None
    """Smallest allowed value."""
    max: float | None = None
    """Largest allowed value."""
    panel: str | None = None
    """Help panel. Default: the class variable `panel` of the dataclass, if it has one."""
    needs: tuple[str, ...] = ()
    """The option is an error unless one of these holds, such as `"data"` (is set) or `"rope=yarn"` (has that value)."""
    in_hash: bool = True
    """Whether the value decides the result, so that it belongs to the run's configuration hash."""


Seed = Annotated[int, Flag(panel="Run")]
"""Type of the field `seed`."""


def flag_of(annotation: Any) -> Flag:
    """The `Flag` of a field's annotation, or an empty one."""
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Flag)), Flag())


def hashed_fields(config: Any) -> dict[str, Any]:
    """The fields of a configuration that decide the result, for its run's provenance."""
    hints = get_type_hints(type(config), include_extras=True)
    return {f.name: getattr(config, f.name) for f in fields(config) if flag_of(hints[f.name]).in_hash}


def refuse_options(given: Collection[str], names: Collection[str], *, there: str, fix: str = "") -> None:
    """Raise UsageError for those of the given options that are among `names`, which have no meaning `there`."""
    if flags := [f"--{name.replace('_', '-')}" for name in names if name in given]:
        what = f"{', '.join(flags)} {'has' if len(flags) == 1 else 'have'} no meaning {there}"
        raise UsageError(what, fix=f"drop {'it' if len(flags) == 1 else 'them'}{fix}")


def parse_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers, each kept once, in ascending order. Raises ValueError."""
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not all(isfinite(n) for n in numbers):
        raise ValueError("write comma-separated numbers")
    return tuple(numbers)


def parse_integers(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers, each kept once, in ascending order. Raises ValueError."""
    numbers = parse_numbers(text)
    if any(n != int(n) for n in numbers):
        raise ValueError("write comma-separated whole numbers")
    return tuple(int(n) for n in numbers)


def parse_token_count(text: str) -> int:
    """`2B`, `1.5M`, `300K` or a plain number. Raises ValueError."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper())
    try:
        return round(float(text[:-1]) * scale) if scale else int(text)
    except (ValueError, OverflowError):
        raise ValueError("not a number; write 500000, 300K or 2B") from None
