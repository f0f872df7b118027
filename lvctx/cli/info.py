"""`lvctx info`: what an artifact or a model directory is, what made it, and what is in it. Loads torch
for models with M-RoPE alone: there it says what transformers computes."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lvctx.cli.common import TOOLS, emit, examples

MROPE = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
"""Architectures whose positions have three axes."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "info",
        rich_help_panel=TOOLS,
        epilog=examples("lvctx info packed --plot", "lvctx info frames/bikes.frames.safetensors --json"),
    )(info)


def info(
    artifact: Annotated[Path, typer.Argument(help="A packed or chat directory, frames file, niah directory or model.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of a table.")] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw a packed or chat directory's lengths before and after.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option("--contact-sheet", help="Draw a frames file's sampled frames into this image.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Where a frames file's video is now, for the sheet.")] = None,
) -> None:
    """Say what an artifact or model directory is, what made it and what is in it."""
    from lvctx.artifacts.describe import describe
    from lvctx.errors import UsageError

    facts = describe(artifact)
    if sheet is not None:
        from lvctx.stages.sheet import contact_sheet

        facts |= contact_sheet(artifact, sheet, video=video)
    if plot and "lengths" not in facts:
        raise UsageError("--plot draws packed directories, not this", where=artifact)
    positions = None
    model = facts.get("model")
    if isinstance(model, dict) and model.get("architecture") in MROPE:
        from lvctx.cli.train import print_channels
        from lvctx.stages.mrope_verify import verify

        positions = verify(artifact)
        facts["mrope"] = positions.summary()
    if as_json:
        emit(facts)
        return
    from rich.console import Console
    from rich.table import Table

    lengths, sources = facts.pop("lengths", {}), facts.pop("sources", {})
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in _flatten(facts):
        table.add_row(key, value)
    console = Console()
    console.print(table)
    if sources:
        # A terminal that is too narrow folds the lines; rich would cut names and numbers short.
        Console(width=max(console.width, 160)).print(_source_table(sources))
    if positions is not None:
        print_channels(positions, stderr=False)
    if plot:
        _plot(lengths, console)


def _source_table(sources: dict[str, Any]) -> Any:
    """What packing did with each source: one row each; columns that are 0 everywhere are left out."""
    from rich.table import Table

    columns = [k for k in next(iter(sources.values())) if any(account[k] for account in sources.values())]
    table = Table("source", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.replace("_", "\n"), justify="right")
    for source, account in sources.items():
        values = (account[k] for k in columns)
        table.add_row(source, *(f"{v:.4f}" if isinstance(v, float) else f"{v or 0:,}" for v in values))
    return table


def _plot(lengths: dict[str, Any], console: Any) -> None:
    """Share of all tokens that lie in documents of each length, before (light) and after (full) packing."""
    totals = {when: sum(counts[f"{when}_tokens"] for counts in lengths.values()) for when in ("before", "after")}
    width = max(20, min(60, console.width - 40))
    console.print("\nshare of tokens by length (tokens):  ░ before  █ after", highlight=False)
    for name, counts in lengths.items():
        for when, ink in (("before", "░"), ("after", "█")):
            share = counts[f"{when}_tokens"] / max(totals[when], 1)
            label = name if when == "before" else ""
            unit = next(name for name in counts if name != "before_tokens").removeprefix("before_")
            bar = f"{ink * round(share * width)} {counts[f'{when}_{unit}']:,} {unit}"
            console.print(f"{label:>17} {share:6.1%} {bar}", highlight=False)


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows
