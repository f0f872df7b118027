"""`lvctx pack-chat`: chat samples of several kinds in, rows of about one length and none cut out."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lvctx.cli.common import (
    PIPELINE,
    AllowPartialOption,
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
from lvctx.errors import UsageError

Sources, Recipe, Counting = (
    "Samples (LLaVA rows or OpenAI messages: JSON, JSONL, Parquet, datasets; repeatable)",
    "Recipe",
    "Counting",
)


class Template(StrEnum):
    """How turns are written."""

    chatml = "chatml"
    own = "own"


class Mode(StrEnum):
    """How hybrid resolution meets models that merge two frames."""

    pair = "pair"
    image = "image"
    literal = "literal"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "pack-chat",
        rich_help_panel=PIPELINE,
        epilog=examples(
            "lvctx pack-chat --model vlm --image shapes/full.json --media shapes --long-share 0 --target-length 2048 "
            "-o chat",
            "lvctx pack-chat --model vlm --image shapes/full.json --media shapes --target-length 4096 -o x --dry-run",
        ),
    )(pack_chat)


def pack_chat(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the rows.")],
    model: Annotated[str, typer.Option(help="Model to be trained: directory or hub id; its weights are not read.")],
    target_length: Annotated[int, typer.Option(help="Tokens that no row exceeds.", min=2)],
    text: Annotated[list[Path] | None, typer.Option(help="Long text.", rich_help_panel=Sources)] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Short, with images.", rich_help_panel=Sources)] = None,
    interleaved: Annotated[
        list[Path] | None, typer.Option(help="Several images a sample.", rich_help_panel=Sources)
    ] = None,
    video: Annotated[list[Path] | None, typer.Option(help="With videos.", rich_help_panel=Sources)] = None,
    media: Annotated[
        Path, typer.Option(help="Folder that paths of images and videos are relative to.", rich_help_panel=Sources)
    ] = Path("."),
    mix: Annotated[
        str | None,
        typer.Option(
            help="Shares of tokens. [text=20,image=25,interleaved=25,video=30, of the kinds given]",
            rich_help_panel=Recipe,
        ),
    ] = None,
    long_share: Annotated[
        float, typer.Option(help="Least share of tokens in long samples.", min=0, max=1, rich_help_panel=Recipe)
    ] = 0.6,
    long_over: Annotated[
        int, typer.Option(help="Tokens beyond which a sample is long.", min=0, rich_help_panel=Recipe)
    ] = 8192,
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens to pack, e.g. 2B. Default: as many as the mix allows.", rich_help_panel=Recipe),
    ] = None,
    template: Annotated[
        Template, typer.Option(help="own: the tokenizer's chat template.", rich_help_panel=Recipe)
    ] = Template.chatml,
    video_fps: Annotated[
        float, typer.Option(help="Frames a second of a video.", min=0.001, rich_help_panel=Counting)
    ] = 2.0,
    max_frames: Annotated[
        int, typer.Option(help="Most frames of a video; more are spread evenly.", min=1, rich_help_panel=Counting)
    ] = 768,
    hybrid: Annotated[
        str | None,
        typer.Option(
            metavar="L,M,S",
            help="In every L frames one of M tokens, the others of M/S. L=1: uniform. [1,240,1; of a LlavaOnevision "
            "its own M]",
            rich_help_panel=Counting,
        ),
    ] = None,
    hybrid_mode: Annotated[
        Mode,
        typer.Option(
            help="Where two frames are merged. pair: L counts pairs. image: none is merged. literal: runs of one size.",
            rich_help_panel=Counting,
        ),
    ] = Mode.pair,
    allow_partial: AllowPartialOption = False,
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Leave out what is not right, and name it, instead of stopping.")
    ] = False,
    shard_tokens: Annotated[int, typer.Option(help="Tokens after which a shard is closed.", min=1)] = 1 << 24,
    recipe: RecipeOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Mix chat samples with text, images and videos to shares, and concatenate them to long rows; none is cut.

    Answers and the end of their turn are learned, or what the template marks as generated; a template that rewrites
    earlier turns is refused. A special token that a turn writes (<|im_end|>), and <image> or <video> in a row without
    one, is text. A turn of the assistant's before the first question is left out.

    A run that was stopped begins again: it keeps no partial result.
    """
    from dataclasses import asdict

    from lvctx.artifacts import schemas
    from lvctx.artifacts.manifest import MANIFEST
    from lvctx.artifacts.store import sha256_file
    from lvctx.stages.pack_chat import plan_chat, run_chat

    sources = {"text": text, "image": image, "interleaved": interleaved, "video": video}
    plan = plan_chat(
        {kind: paths for kind, paths in sources.items() if paths},
        model=model,
        media=media,
        mix=None if mix is None else _shares(mix),
        hybrid=None if hybrid is None and hybrid_mode == Mode.pair else _hybrid(hybrid or "1,240,1", hybrid_mode),
        target_length=target_length,
        tokens=None if tokens is None else count_tokens(tokens),
        long_share=long_share,
        long_over=long_over,
        video_fps=video_fps,
        max_frames=max_frames,
        template=template.value,
        skip_malformed=skip_malformed,
        allow_partial=allow_partial,
        shard_tokens=shard_tokens,
        seed=seed,
    )
    if dry_run:
        files = {kind: [str(p) for p in paths] for kind, paths in plan.sources.items()}
        rule = type(plan.rule).__name__ if plan.rule else None
        emit({"dry_run": True, "path": str(out), **asdict(plan.config), "sources": files, "rule": rule})
        return
    with progress("pack-chat", quiet=quiet) as report:
        manifest = run_chat(plan, out, resume=resume.value, force=force, report=report)
    facts = {key: manifest[key] for key in ("rows", "tokens", "samples", "target_length", "fill")}
    facts["long_share"] = manifest["long"]["share_achieved"]
    emit({"schema": schemas.CHAT, "path": str(out), "sha256": sha256_file(out / MANIFEST), **facts})


def _shares(text: str) -> dict[str, float]:
    try:
        shares = {kind.strip(): float(share) for kind, _, share in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise UsageError(f"--mix {text!r} is no mix", fix="write text=20,image=25,interleaved=25,video=30") from None
    if not all(0 <= share < float("inf") for share in shares.values()):
        raise UsageError(f"--mix {text!r} has a share that is none", fix="give numbers from 0 on")
    return shares


def _hybrid(text: str, mode: Mode) -> dict[str, Any]:
    try:
        group, tokens, ratio = (int(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"--hybrid {text!r} is not L,M,S", fix="write 4,240,3") from None
    return {"group": group, "tokens": tokens, "ratio": ratio, "mode": mode.value}
