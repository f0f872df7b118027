"""The program: its commands, loaded on demand, and the exit codes."""

import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lvctx import __version__
from lvctx.cli.output import say
from lvctx.errors import (
    EXIT_INTERRUPTED,
    EXIT_READER_GONE,
    EXIT_STOPPED,
    InputError,
    LvctxError,
    Stopped,
    memory_errors,
)

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Training": {
        "pack-text": ("prepare", "Tokenize documents and pack them into fixed-length rows."),
        "extend-lm": (
            "train",
            "Extend the context of a language model: a new RoPE base, then training on long packed rows of text.",
        ),
        "align": ("train", "Train a language model to process images, with a vision tower and a projector."),
        "pack-chat": ("prepare", "Mix chat samples with text, images and videos and pack them into long rows."),
    },
    "Video and evaluation": {
        "encode-video": ("encode_video", "Sample videos and store the vision tower's features of their frames."),
        "mrope-extend": ("train", "Extend the context of a Qwen-VL model with M-RoPE++."),
        "niah": ("niah", "Needle-in-a-haystack test over context lengths and needle depths, in text or in video."),
        "perplexity": ("evaluate", "Perplexity of language models by position in long rows of text."),
        "vqa": ("vqa", "Answer questions about videos."),
        "videomme": ("videomme_score", "Video-MME: run a model on its questions, and score it or existing responses."),
        "bench": ("benchmarks", "Other benchmarks of long video: run a model on their questions, and score it."),
        "report": ("evaluate", "Show evaluation results and training curves on one self-contained HTML page."),
    },
    "Utilities": {
        "import-longva": ("convert", "Convert a released LongVA checkpoint for transformers and vLLM."),
        "export": (
            "convert",
            "Write a model in the format of another program, add results to its card, and upload it.",
        ),
        "info": ("inspect", "Show the kind, provenance and content of a model directory or artifact."),
        "plan": ("inspect", "Predict the memory and time of a training run from config.json alone."),
        "doctor": ("inspect", "Check that context parallelism is exact with a model on this machine."),
    },
}
"""Panel of the help -> command -> (module of `lvctx.cli`, one line of help); the pipeline's commands first."""

MODULES = {name: module for commands in COMMANDS.values() for name, (module, _) in commands.items()}
"""Command -> module, in the order of the help."""


def load_command(name: str) -> Any:
    """Import a command's module and build the command, or the group, with all its options."""
    import_module(f"lvctx.cli.{MODULES[name]}")
    from lvctx.cli.options import build

    return build(name)


class Program(TyperGroup):
    """The group of all commands: turns every outcome of a command into one line and an exit code (see `errors`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for panel, commands in COMMANDS.items():
            for name, (_, line) in commands.items():
                self.add_command(TyperCommand(name=name, help=line, rich_help_panel=panel))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Load the requested command; other commands are only a name and a line of help."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in MODULES else command, rest

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Parse the program's own options; --help and --version write to stdout here."""
        with _outcomes():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        previous, unraisable = signal.signal(signal.SIGTERM, _on_sigterm), sys.unraisablehook
        sys.unraisablehook = _again_if_stopped
        try:
            with _outcomes():
                return super().invoke(ctx)
        finally:
            sys.unraisablehook = unraisable
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def _outcomes() -> Iterator[None]:
    """Turn every outcome of the body into at most one line on stderr and an exit code."""
    try:
        _require_stdout()
        try:
            with memory_errors():
                yield
        finally:
            sys.stdout.flush()  # else Python flushes on exit, where an error would be a traceback
    except LvctxError as e:
        say(f"lvctx: {e}")
        raise typer.Exit(e.exit_code) from e
    except Stopped:
        say("lvctx: stopped by a signal; run the same command again to continue")
        raise typer.Exit(EXIT_STOPPED) from None
    except KeyboardInterrupt:
        say("lvctx: interrupted; run the same command again to continue")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # how rich ends a program whose reader is gone
            raise typer.Exit(EXIT_READER_GONE) from None
        raise
    except OSError as e:
        if e.errno == errno.EPIPE:
            _forget_stdout()
            raise typer.Exit(EXIT_READER_GONE) from None
        if e.filename is None and e.errno not in WRITE_ERRORS:
            say(traceback.format_exc())
            raise typer.Exit(1) from e
        # The system's error for a path that the user gave, such as a name that is too long.
        logging.getLogger(__name__).info("the traceback", exc_info=True)
        if e.filename is None:
            _forget_stdout()
        where = "stdout" if e.filename is None else os.fsdecode(e.filename)
        say(f"lvctx: {InputError(f'{e.strerror}', where=where, fix='check the path and its permissions')}")
        raise typer.Exit(InputError.exit_code) from e


WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing to an open file, which the system reports without the file's name."""


def _require_stdout() -> None:
    """Open /dev/null in place of a closed stdin or stderr. Raises InputError for a closed stdout.

    A file that is opened later would else become that stream, and get what is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == descriptor
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 (open until the program ends)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise InputError("closed", where="stdout", fix="redirect it to a file or to /dev/null")


def _forget_stdout() -> None:
    """Redirect stdout to /dev/null: Python would fail again when it flushes stdout on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Stopped


def _again_if_stopped(unraisable: Any) -> None:
    """Send a signal again whose exception Python swallowed, as it does in `__del__` and weakref callbacks."""
    number = {Stopped: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    # From another thread and later: sent from here, it would be raised and swallowed here.
    timer = threading.Timer(0.01, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


app = typer.Typer(
    name="lvctx",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "LVCTX", "help_option_names": ["-h", "--help"]},
    help="Extend a language model's context on text, align it with images, evaluate it on hour-long video. "
    "The value of a flag is taken from the command line, else from the variable LVCTX_COMMAND_FLAG, else from "
    "--recipe, else from --protocol, else it is the default.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lvctx {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program."""
