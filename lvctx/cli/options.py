"""Commands from configuration dataclasses: every field is an option; recipes and LVCTX_* variables follow.

A command is a function of dataclasses, such as `def pack_text(config: PackTextConfig, run: RunOptions)`. A field gives
the option's name, type and default, its docstring the help, and `lvctx.config.Flag` everything else. A value is
taken from the command line, else from LVCTX_COMMAND_FLAG, else from --recipe, else from the command's presets, else
from the field's default.
"""

import ast
import inspect
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from lvctx.cli import output
from lvctx.cli.recipes import load_recipe
from lvctx.config import Flag, flag_of
from lvctx.errors import InputError, LvctxError, UsageError

FunctionT = TypeVar("FunctionT", bound=Callable[..., None])
Presets = Callable[[Mapping[str, Any], frozenset[str]], Mapping[str, Any]]
"""(values of all options, names set by the user) -> values in place of defaults, as TOML has them."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Options of every command."""

    panel: ClassVar[str] = "Run"

    recipe: Annotated[str | None, Flag(metavar="FILE[#SECTION]")] = None
    """Take defaults from a section of a TOML file. Default section: the command's name."""
    json: bool = False
    """Write JSON lines to stdout even on a terminal."""
    quiet: Annotated[bool, Flag(names=("-q", "--quiet"))] = False
    """Show no progress on stderr."""
    verbose: Annotated[bool, Flag(names=("-v", "--verbose"))] = False
    """Log each step and the reasons for it to stderr."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(OutputOptions):
    """Options of every command that writes an artifact."""

    resume: Literal["auto", "never", "must"] = "auto"
    """Continue an unfinished output: if there is one, never, or fail if there is none."""
    force: bool = False
    """Overwrite the output of another run."""
    dry_run: bool = False
    """Check the inputs, print the resolved configuration and stop."""


@dataclass(frozen=True, kw_only=True)
class _Declared:
    """A command or a group of commands declared by a module."""

    function: Callable[..., None] | None
    help: str
    examples: tuple[str, ...]
    presets: Presets | None = None


_declared: dict[str, _Declared] = {}


def command(name: str, *examples: str, presets: Presets | None = None) -> Callable[[FunctionT], FunctionT]:
    """Declare a command; `name` may have several words (`niah report`). A test runs the examples in the help.

    The function's parameters are configuration dataclasses, and `typer.Context` if it calls `given`. `presets` replace
    defaults; those of options that would have no effect are left out, and `given` does not have them.
    """

    def declare(function: FunctionT) -> FunctionT:
        help = _unwrap(function.__doc__ or "")
        _declared[name] = _Declared(function=function, help=help, examples=examples, presets=presets)
        return function

    return declare


def group(name: str, help: str, *examples: str) -> None:
    """Declare a group; its commands are declared with the group's name as prefix."""
    _declared[name] = _Declared(function=None, help=help, examples=examples)


def build(name: str) -> Any:
    """The Typer command or group of a declared name, with everything below it."""
    declared = _declared[name]
    epilog = "Examples:\n\n" + "\n\n".join(map(_escape, declared.examples)) if declared.examples else None
    if declared.function is not None:
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        callback = _callback(name, declared.function, declared.presets)
        app.command(name.split()[-1], help=_escape(declared.help), epilog=epilog)(callback)
        return typer.main.get_command(app)
    below = {other for other in _declared if other.startswith(f"{name} ") and " " not in other[len(name) + 1 :]}
    commands = {other.split()[-1]: build(other) for other in _declared if other in below}
    help = _escape(declared.help)
    return TyperGroup(name=name.split()[-1], commands=commands, help=help, epilog=epilog, no_args_is_help=True)


def given(ctx: typer.Context) -> frozenset[str]:
    """Names of the fields that the user set: on the command line, in the environment or in a recipe."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name != "DEFAULT")


def option_name(field: Field[Any], flag: Flag) -> str:
    """Name of a field in messages and recipes: `--seq-len`, or the name of an argument."""
    if flag.argument:
        return flag.metavar or field.name.upper()
    return flag.names[-1].partition("/")[0] if flag.names else f"--{field.name.replace('_', '-')}"


def card_command(name: str, config: Any) -> str:
    """The command line of a configuration for a model card: options that are not defaults, and no local path.

    A path is replaced by the option's name in capitals, so that the same inputs give the same text; hub ids stay.
    """
    words = ["lvctx", *name.split()]
    for field, annotation, flag in config_fields(type(config)):
        value = getattr(config, field.name)
        if value in (None, ()) or (field.default is not MISSING and value == field.default):
            continue
        names = [] if flag.argument else [flag.names[0] if flag.names else f"--{field.name.replace('_', '-')}"]
        if value is True or value is False:
            words += names if value else [f"--no-{names[0].removeprefix('--')}"]
            continue
        names_model = field.name in ("model", "lm", "tower", "init", "source")
        is_path = names_model or "Path" in str(annotation)
        for one in value if isinstance(value, tuple) and flag.parse is None else (value,):
            may_be_id = (names_model or field.name == "data") and not Path(one).exists()
            is_id = may_be_id and re.fullmatch(r"[\w-][\w.-]*/[\w.@-]+", str(one))
            text = field.name.upper() if is_path and not is_id else re.sub("data=[^,]*", "data=DATA", str(one))
            words += [*names, text]
    return shlex.join(words)


def config_fields(config_class: type) -> Iterator[tuple[Field[Any], Any, Flag]]:
    """Field, type and `Flag` of each option of a configuration dataclass."""
    hints = get_type_hints(config_class, include_extras=True)
    for field in fields(config_class):
        annotation = hints[field.name]
        flag = flag_of(annotation)
        yield field, get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation, flag


def config_classes(function: Callable[..., None]) -> dict[str, type]:
    """The parameters of a command that are configuration dataclasses."""
    return {n: hint for n, hint in get_type_hints(function).items() if isinstance(hint, type) and is_dataclass(hint)}


def field_help(config_class: type) -> dict[str, str]:
    """The first paragraph of each field's docstring; a subclass inherits those that it does not override."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if is_dataclass(base):
            docs |= _docstrings(sys.modules[base.__module__].__file__ or "").get(base.__qualname__, {})
    return docs


@cache
def _docstrings(file: str) -> dict[str, dict[str, str]]:
    """Class name -> field name -> docstring, for the top-level classes of a source file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    docs: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        docs[node.name] = {}
        for statement, following in zip(node.body, node.body[1:], strict=False):
            is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = _unwrap(str(following.value.value)).partition("\n\n")[0]
                docs[node.name][statement.target.id] = text  # type: ignore[attr-defined]
    return docs


def _unwrap(docstring: str) -> str:
    """Put each paragraph on one line."""
    return "\n\n".join(" ".join(p.split()) for p in inspect.cleandoc(docstring).split("\n\n"))


def _escape(text: str) -> str:
    """Escape square brackets in help, which rich would read as markup."""
    return text.replace("[", "\\[")


def _callback(name: str, function: Callable[..., None], presets: Presets | None) -> Callable[..., None]:
    """A function for Typer with one parameter per field, which builds the dataclasses and calls the command."""
    classes = config_classes(function)
    wants_context = [n for n, hint in get_type_hints(function).items() if hint is typer.Context]

    def callback(ctx: typer.Context, **values: Any) -> None:
        if presets is not None:
            values |= _preset_values(classes.values(), values, presets(values, given(ctx)))
        for config_class in classes.values():
            _check_needs(config_class, values, given(ctx))
        _check_texts(values)
        configs = {n: _from_values(config_class, values) for n, config_class in classes.items()}
        for config in configs.values():
            if isinstance(config, OutputOptions):
                output.configure(json=config.json, quiet=config.quiet, verbose=config.verbose)
        function(**configs, **dict.fromkeys(wants_context, ctx))

    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for config_class in classes.values():
        docs = field_help(config_class)
        panel = getattr(config_class, "panel", None)
        for field, annotation, flag in config_fields(config_class):
            parameters.append(_parameter(field, annotation, flag, docs.get(field.name, ""), panel))
    names = [p.name for p in parameters]
    assert len(set(names)) == len(names), f"{name}: two options have one name: {names}"
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {p.name: p.annotation for p in parameters}
    return callback


def _parameter(field: Field[Any], annotation: Any, flag: Flag, help: str, panel: str | None) -> inspect.Parameter:
    """The parameter of Typer's function for one field."""
    default = None if field.default is MISSING else field.default
    required = field.default is MISSING
    element = _element(annotation)
    if flag.parse is not None:
        annotation, default = str, _as_text(default)
    elif element is not None:
        annotation, default = list[element], list(default) if default else None  # type: ignore[valid-type]
    else:
        annotation = _without_none(annotation)
    common: dict[str, Any] = {
        "help": _escape(help),
        "metavar": flag.metavar,
        "min": flag.min,
        "max": flag.max,
        "rich_help_panel": flag.panel or panel,
        "show_envvar": False,
    }
    if field.name == "recipe":
        common |= {"is_eager": True, "callback": load_recipe}
    if flag.argument:
        info: Any = typer.Argument(... if required else default, **common)
    else:
        names = flag.names or (f"--{field.name.replace('_', '-')}",)
        if annotation is bool and default and not flag.names:
            names = (f"{names[0]}/--no-{names[0].removeprefix('--')}",)
        info = typer.Option(... if required else default, *names, **common)
    if not required and annotation is not bool:
        annotation = annotation | None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=annotation)


def _element(annotation: Any) -> Any:
    """The element type of `tuple[X, ...]` and of `tuple[X, ...] | None`; None for other types."""
    annotation = _without_none(annotation)
    if get_origin(annotation) is tuple:
        element, ellipsis = get_args(annotation)
        assert ellipsis is Ellipsis, f"{annotation}: write tuple[X, ...]"
        return element
    return None


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [arg for arg in get_args(annotation) if arg is not type(None)]
        return members[0] if len(members) == 1 else annotation
    return annotation


def _as_text(value: Any) -> str | None:
    """A default in the notation of the command line."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def _from_values(config_class: type, values: Mapping[str, Any]) -> Any:
    """A configuration from the values parsed by Typer. Raises UsageError for a text that cannot be parsed."""
    arguments: dict[str, Any] = {}
    for field, annotation, flag in config_fields(config_class):
        value = values[field.name]
        if flag.parse is not None and value is not None:
            try:
                value = flag.parse(value)
            except LvctxError:
                raise
            except ValueError as e:
                raise UsageError(f"{option_name(field, flag)} {value!r}: {e}") from None
        elif _element(annotation) is not None:
            value = tuple(value) if value else field.default if field.default is not MISSING else ()
        arguments[field.name] = value
    return config_class(**arguments)


def _preset_values(classes: Iterable[type], values: Mapping[str, Any], preset: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of `preset` that have an effect, as Typer would give them."""
    merged = {**values, **preset}
    of_options = [(field.name, flag) for config_class in classes for field, _, flag in config_fields(config_class)]
    applied = [(name, flag) for name, flag in of_options if name in preset and has_effect(flag, merged)]
    return {name: str(preset[name]) if flag.parse is not None else preset[name] for name, flag in applied}


def _check_texts(values: Mapping[str, Any]) -> None:
    """Raise UsageError for a NUL, which no path can have, and InputError for an --out below a file."""
    for name, value in values.items():
        if any("\0" in str(part) for part in (value if isinstance(value, list | tuple) else [value])):
            raise UsageError(f"{name} holds a NUL", fix="remove it")
    out = values.get("out")
    if isinstance(out, Path) and (file := next((p for p in out.parents if p.exists() and not p.is_dir()), None)):
        raise InputError("a file, not a directory", where=file, fix="choose another -o")


def has_effect(flag: Flag, values: Mapping[str, Any]) -> bool:
    """Whether an option has what it needs among the values of all options."""
    return not flag.needs or any(_holds(need, values) for need in flag.needs)


def _check_needs(config_class: type, values: Mapping[str, Any], names: frozenset[str]) -> None:
    """Raise UsageError for an option that the user set without the options that it needs."""
    for field, _, flag in config_fields(config_class):
        if field.name not in names or has_effect(flag, values):
            continue
        wanted = " or ".join("--" + need.replace("_", "-").replace("=", " ") for need in flag.needs)
        name = option_name(field, flag)
        raise UsageError(f"{name} needs {wanted}", fix=f"drop {name}, or give {wanted}")


def _holds(need: str, values: Mapping[str, Any]) -> bool:
    name, equals, value = need.partition("=")
    return str(values[name]) == value if equals else values[name] not in (None, False, 0, "", [], ())
