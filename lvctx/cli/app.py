"""The program: its commands, loaded on demand, and the exit codes."""

import errno
import os
import signal
import sys
import traceback
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lvctx import __version__
from lvctx.cli.output import say
from lvctx.errors import EXIT_INTERRUPTED, EXIT_READER_GONE, EXIT_STOPPED, LvctxError, Stopped

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
        "perplexity": ("perplexity_run", "Perplexity of language models by position in long rows of text."),
        "vqa": ("vqa", "Answer questions about videos."),
        "videomme": ("videomme_score", "Video-MME: run a model on its questions, and score it or existing responses."),
        "bench": ("bench_merge", "Other benchmarks of long video: run a model on their questions, and score it."),
        "report": ("report", "Show results of any of these, and training curves, on one self-contained HTML page."),
    },
    "Utilities": {
        "import-longva": ("convert", "Convert a released LongVA checkpoint for transformers and vLLM."),
        "export": ("convert", "Write a model in the format of another program."),
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

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        previous = signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            return super().invoke(ctx)
        except LvctxError as e:
            say(f"lvctx: {e}")
            raise typer.Exit(e.exit_code) from e
        except Stopped:
            say("lvctx: stopped by a signal; run the same command again to continue")
            raise typer.Exit(EXIT_STOPPED) from None
        except KeyboardInterrupt:
            say("lvctx: interrupted; run the same command again to continue")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except OSError as e:
            if e.errno != errno.EPIPE:
                say(traceback.format_exc())
                raise typer.Exit(1) from e
            # The reader is gone, and Python would fail again when it flushes stdout on exit: redirect stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_READER_GONE) from None
        finally:
            signal.signal(signal.SIGTERM, previous)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise Stopped


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
