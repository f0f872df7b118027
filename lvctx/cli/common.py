"""What every command shares: errors to exit codes, rows to stdout, progress to stderr, recipes and the usual options.

Nothing heavy is imported here: `lvctx --help` has to answer at once, so torch comes with a command's body.
"""

import errno
import json
import logging
import os
import signal
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lvctx.errors import (
    EXIT_INTERRUPTED,
    EXIT_READER_GONE,
    EXIT_STOPPED,
    InputError,
    LvctxError,
    Stopped,
    UsageError,
)

PIPELINE, VIDEO, TOOLS = "Teach (text, then images)", "Watch (video, then questions)", "Look"
"""Help panels, in the order the pipeline runs."""

ORDER = (
    *("pack-text", "pack-chat", "extend-lm", "align", "import-longva", "export", "encode-video", "mrope-extend"),
    *("niah", "vqa", "videomme", "bench", "plan", "doctor", "info"),
)
"""Commands as the pipeline runs."""


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks: alone, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def emit(row: dict[str, Any]) -> None:
    """Write one JSON line to stdout and flush it, so that the next command in a pipe can start on it."""
    if is_rank_zero():
        line = json.dumps(row, ensure_ascii=False)
        if not line.isprintable() and any("\ud800" <= c <= "\udfff" for c in line):
            line = json.dumps(row)  # a file name that is not UTF-8 can only be escaped
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def say(line: str) -> None:
    """Write one line for a human to stderr."""
    if is_rank_zero():
        print(line, file=sys.stderr, flush=True)


def count_tokens(text: str) -> int:
    """`2B`, `1.5M`, `300K` or a plain number."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}.get(text[-1:].upper())
    try:
        return round(float(text[:-1]) * scale) if scale else int(text)
    except ValueError:
        raise UsageError(f"--tokens {text!r} is no number", fix="write 500000, 300K, 2B") from None


class Commands(TyperGroup):
    """The command group that turns every way a command can end into one line and the contract's exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Commands in the order of the pipeline; Typer would put those with commands of their own last."""
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command whose help does not repeat LVCTX_COMMAND_FLAG under every flag; the program's own help says it."""
        command: Any = super().get_command(ctx, cmd_name)
        if command:
            _hide_variables(command)
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run a command; see `errors.py` for the exit codes."""
        previous = signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            return super().invoke(ctx)
        except LvctxError as e:
            say(f"lvctx: {e}")
            raise typer.Exit(e.exit_code) from e
        except Stopped:
            say("lvctx: stopped by a signal; run the same command again to go on from here")
            raise typer.Exit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            say("lvctx: interrupted; run the same command again to go on from here")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except OSError as e:
            if e.errno != errno.EPIPE:
                say(traceback.format_exc())
                raise typer.Exit(1) from e
            # The reader is gone. Python would complain once more when it flushes stdout on exit: give it nowhere to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_READER_GONE) from None
        finally:
            signal.signal(signal.SIGTERM, previous)


def _hide_variables(command: Any) -> None:
    for parameter in command.params:
        parameter.show_envvar = False
    for below in getattr(command, "commands", {}).values():
        _hide_variables(below)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Stopped


def examples(*lines: str) -> str:
    """The epilog of a command's help; a test runs every line of it."""
    return "Examples:\n\n" + "\n\n".join(lines)


def numbers(flag: str, text: str) -> list[float]:
    """Comma-separated numbers of a flag, each once, ascending. Raises UsageError."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(isfinite(n) for n in found):
        raise UsageError(f"{flag} {text!r}: comma-separated numbers are wanted")
    return found


def load_recipe(ctx: typer.Context, recipe: str | None) -> str | None:
    """Take defaults from `FILE.toml[#section]`; the section defaults to the command's name.

    An array of tables stands for a flag that is repeated, each table for `key=value,key=value`. Flags and LVCTX_*
    variables win over a recipe. Raises InputError for a missing file, section or an unknown key.
    """
    if recipe is None:
        return None
    name, _, section = recipe.partition("#")
    section = section or str(ctx.info_name)
    try:
        table = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=name) from e
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"not valid TOML ({e})", where=name) from e
    if section not in table:
        raise InputError(f"no section [{section}]", where=name, fix=f"it has {', '.join(table)}")
    values = {key.replace("-", "_"): _as_flag(value) for key, value in table[section].items()}
    known = {p.name for p in ctx.command.params}
    for key in values:
        if key not in known:
            raise InputError(f"unknown key {key!r} in [{section}]", where=name, fix=f"lvctx {ctx.info_name} --help")
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return recipe


def _as_flag(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return [",".join(f"{key}={one}" for key, one in entry.items()) for entry in value]
    return value


def set_verbosity(ctx: typer.Context, verbose: bool) -> bool:
    """Send the library's log to stderr: warnings always, everything with --verbose."""
    logging.basicConfig(
        stream=sys.stderr, format="lvctx: %(message)s", level=logging.INFO if verbose else logging.WARNING
    )
    return verbose


class Resume(StrEnum):
    """What to do with an output that stands already."""

    auto = "auto"
    never = "never"
    must = "must"


RunOptions = "Run"
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE[#SECTION]",
        is_eager=True,
        callback=load_recipe,
        help="Defaults from a TOML recipe.",
        rich_help_panel=RunOptions,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice.", rich_help_panel=RunOptions)]
ResumeOption = Annotated[
    Resume, typer.Option("--resume", help="Go on from an unfinished output.", rich_help_panel=RunOptions)
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Overwrite an output of another run.", rich_help_panel=RunOptions)
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the inputs, print the plan, stop.", rich_help_panel=RunOptions),
]
AllowPartialOption = Annotated[
    bool,
    typer.Option("--allow-partial", help="Take what can be decoded of cut or damaged videos; rows then say `partial`."),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress on stderr.", rich_help_panel=RunOptions)]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        help="Log what is done and why.",
        callback=set_verbosity,
        rich_help_panel=RunOptions,
    ),
]

Report = Callable[[int, int, str], None]
"""Progress of a stage: (done, total, note). Stages call it; where it goes is the caller's business."""


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Report]:
    """A progress bar on stderr where that is a terminal; nothing otherwise, nor on other ranks, nor when quiet."""
    if quiet or not sys.stderr.isatty() or not is_rank_zero():
        yield lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)
