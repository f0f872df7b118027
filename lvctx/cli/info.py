"""`lvctx info`: what an artifact or a model directory is, what made it, and what is in it. Never loads torch."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lvctx.cli.common import TOOLS, emit, examples


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "info",
        rich_help_panel=TOOLS,
        epilog=examples("lvctx info packed", "lvctx info frames/bikes.frames.safetensors --json"),
    )(info)


def info(
    artifact: Annotated[Path, typer.Argument(help="A packed directory, frames file, niah directory or model.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of a table.")] = False,
) -> None:
    """Say what an artifact or model directory is, what made it and what is in it."""
    from lvctx.artifacts.describe import describe

    facts = describe(artifact)
    if as_json:
        emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in _flatten(facts):
        table.add_row(key, value)
    Console().print(table)


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
