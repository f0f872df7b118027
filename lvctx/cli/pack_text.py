"""`lvctx pack-text`: documents in, rows of token ids of one length out."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import (
    PIPELINE,
    DryRunOption,
    ForceOption,
    QuietOption,
    RecipeOption,
    Resume,
    ResumeOption,
    SeedOption,
    VerboseOption,
    count_tokens,
    emit,
    examples,
    progress,
)

Recipe, Reading = "Which documents", "How they are read"


class Invalid(StrEnum):
    """What to do with invalid UTF-8."""

    REPLACE = "replace"
    SKIP = "skip"
    ERROR = "error"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "pack-text",
        rich_help_panel=PIPELINE,
        epilog=examples(
            "lvctx pack-text essays -o rows --tokenizer lm --seq-len 256 --keep-short 1",
            "lvctx pack-text essays -o rows-long --tokenizer lm --seq-len 1024 --min-long 2000 --dry-run",
        ),
    )(pack_text)


def pack_text(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="JSON, Parquet or text files (also .gz, .zst, .xz, .bz2), folders, - or a datasets hub id.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the packed rows.")],
    tokenizer: Annotated[str, typer.Option(help="Model directory, tokenizer.json or hub id.")],
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")],
    tokens: Annotated[
        str | None, typer.Option(help="Tokens to pack, e.g. 500000 or 2B. Default: as many as the mix allows.")
    ] = None,
    min_long: Annotated[
        int, typer.Option(help="Keep every document of more tokens.", min=0, rich_help_panel=Recipe)
    ] = 4096,
    keep_short: Annotated[
        float, typer.Option(help="Probability to keep a shorter one.", min=0.0, max=1.0, rich_help_panel=Recipe)
    ] = 0.1,
    mix: Annotated[
        str,
        typer.Option(
            help="Shares of sources: slimpajama, keep (the input's own), none, or a TOML or JSON file. "
            "auto: slimpajama where documents name a source, else none.",
            rich_help_panel=Recipe,
        ),
    ] = "auto",
    separator: Annotated[
        str,
        typer.Option(
            help="Token or id before each document. auto: bos, else <|endoftext|>, else eos.", rich_help_panel=Recipe
        ),
    ] = "auto",
    keep_tail: Annotated[
        bool,
        typer.Option(
            "--keep-tail", help="Keep the last, partial row, filled up with separators.", rich_help_panel=Recipe
        ),
    ] = False,
    text_field: Annotated[
        str, typer.Option(help="Field that holds the document (a.b goes inside).", rich_help_panel=Reading)
    ] = "text",
    source_field: Annotated[
        str | None,
        typer.Option(help="Field that names the source. [source, meta.redpajama_set_name]", rich_help_panel=Reading),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a dataset.", rich_help_panel=Reading)] = "train",
    invalid: Annotated[
        Invalid, typer.Option(help="Invalid UTF-8: replace it, skip its document, or stop.", rich_help_panel=Reading)
    ] = Invalid.REPLACE,
    skip_malformed: Annotated[
        bool,
        typer.Option("--skip-malformed", help="Count malformed records instead of stopping.", rich_help_panel=Reading),
    ] = False,
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens a shard: what a killed run redoes at most.", min=1, rich_help_panel=Reading)
    ] = 1 << 24,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Tokenizing processes; changes no byte. Default: one a core.", min=1, rich_help_panel=Reading
        ),
    ] = None,
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Tokenize documents and pack them into rows of one length.

    Keeps all long documents, subsamples short ones, and preserves the proportions of the sources.

    A special token that a document writes (<|endoftext|>) is text. A tokenizer that cannot write it as text (Unigram
    with it among its pieces) makes the document malformed.
    """
    import os
    from dataclasses import asdict

    from lvctx.artifacts import schemas
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file
    from lvctx.stages.pack import plan_pack, run_pack

    plan = plan_pack(
        inputs,
        tokenizer=tokenizer,
        separator=separator,
        mix=mix,
        seq_len=seq_len,
        tokens=None if tokens is None else count_tokens(tokens),
        min_long=min_long,
        keep_short=keep_short,
        keep_tail=keep_tail,
        text_field=text_field,
        source_field=source_field,
        split=split,
        invalid=invalid.value,
        skip_malformed=skip_malformed,
        shard_tokens=shard_tokens,
        seed=seed,
    )
    cores = workers or len(os.sched_getaffinity(0))
    if dry_run:
        kinds = [part.kind for part in plan.corpus.parts]
        emit(
            {
                "dry_run": True,
                "path": str(out),
                **asdict(plan.config),
                "separator_token": plan.tokenizer.separator_token,
                "inputs": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
                "input_bytes": plan.corpus.size,
                "output_bytes": 4 * plan.config.tokens if plan.config.tokens else None,
                "workers": cores,
            }
        )
        return
    with progress("pack-text", quiet=quiet) as report:
        manifest = run_pack(plan, out, workers=cores, resume=resume.value, force=force, report=report)
    facts = {key: manifest[key] for key in ("rows", "tokens", "seq_len")}
    emit({"schema": schemas.PACKED, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})
