"""The program: its commands in the order the pipeline runs."""

from typing import Annotated

import typer

from lvctx import __version__
from lvctx.cli.common import Commands

app = typer.Typer(
    name="lvctx",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "LVCTX", "help_option_names": ["-h", "--help"]},
    help="Long-context video understanding as unix steps. Text teaches a language model to read far; images teach "
    "it to see; then it can watch an hour of video. "
    "A flag's value is looked for on the command line, then in LVCTX_COMMAND_FLAG, then in --recipe, then its default.",
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
    """Options of the program itself."""


def _register() -> None:
    from lvctx.cli import (
        align,
        bench,
        doctor,
        encode_video,
        export,
        extend_lm,
        import_longva,
        info,
        mrope_extend,
        niah,
        pack_chat,
        pack_text,
        plan,
        videomme,
        vqa,
    )

    teach = (pack_text, pack_chat, extend_lm, align, import_longva, export)
    watch = (encode_video, mrope_extend, niah, vqa, videomme, bench)
    for module in (*teach, *watch, plan, doctor, info):
        module.register(app)


_register()
