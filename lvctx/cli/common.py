"""Options of the commands that are still written by hand, one Typer parameter each; see `options` for the others."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer

from lvctx.cli import output
from lvctx.cli.options import _load_recipe as load_recipe
from lvctx.cli.output import emit, is_rank_zero, say
from lvctx.config import OnProgress as Report
from lvctx.config import parse_numbers
from lvctx.errors import UsageError

__all__ = ("Report", "emit", "is_rank_zero", "say")

PIPELINE, VIDEO, TOOLS = "Training", "Video and evaluation", "Utilities"


def hide_variables(command: Any) -> None:
    """Do not repeat LVCTX_COMMAND_FLAG under every flag; the program's own help has it."""
    for parameter in command.params:
        parameter.show_envvar = False
    for below in getattr(command, "commands", {}).values():
        hide_variables(below)


def examples(*lines: str) -> str:
    """The epilog of a command's help; a test runs every line of it."""
    return "Examples:\n\n" + "\n\n".join(lines)


def numbers(flag: str, text: str) -> list[float]:
    """Comma-separated numbers of a flag, each once, ascending. Raises UsageError."""
    try:
        return list(parse_numbers(text))
    except ValueError as e:
        raise UsageError(f"{flag} {text!r}: {e}") from None


def set_verbosity(ctx: typer.Context, verbose: bool) -> bool:
    """Send the library's log to stderr: warnings always, everything with --verbose."""
    logging.basicConfig(
        stream=sys.stderr, format="lvctx: %(message)s", level=logging.INFO if verbose else logging.WARNING
    )
    return verbose


class Resume(StrEnum):
    """What to do with an output that exists already."""

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
    typer.Option("--allow-partial", help="Use what can be decoded of truncated or damaged videos."),
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


@contextmanager
def progress(label: str, *, quiet: bool) -> Iterator[Report]:
    """`output.progress`, unless quiet."""
    if quiet:
        yield lambda done, total, note: None
        return
    with output.progress(label) as report:
        yield report
