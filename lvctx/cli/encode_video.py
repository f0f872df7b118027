"""`lvctx encode-video`: videos in, what a vision tower sees in their frames out."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from fractions import Fraction
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lvctx.cli.common import (
    VIDEO,
    AllowPartialOption,
    DryRunOption,
    ForceOption,
    QuietOption,
    RecipeOption,
    Resume,
    ResumeOption,
    VerboseOption,
    emit,
    examples,
    progress,
    say,
)
from lvctx.errors import EXIT_SAMPLES_FAILED, LvctxError, UsageError

if TYPE_CHECKING:
    from lvctx.vlm.video_encoder import World


class FrameModeChoice(StrEnum):
    """How a frame becomes a square."""

    crop = "crop"
    pad = "pad"
    squash = "squash"


class DecoderChoice(StrEnum):
    """What reads the video."""

    auto = "auto"
    pyav = "pyav"
    decord = "decord"


class SamplingChoice(StrEnum):
    """Which frames are taken."""

    exact = "exact"
    keyframe = "keyframe"


class DtypeChoice(StrEnum):
    """What the tower computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(
        "encode-video",
        rich_help_panel=VIDEO,
        epilog=examples(
            "lvctx encode-video clips/bikes.mp4 --model vlm --fps 2 -o frames-2fps",
            "ls clips/*.mp4 | lvctx encode-video - --model vlm --frames 4 -o frames-4",
        ),
    )(encode_video)


def encode_video(
    videos: Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Video files; - reads them from stdin.")],
    model: Annotated[str | None, typer.Option(help="VLM whose tower looks: directory or hub id.")] = None,
    tower: Annotated[str | None, typer.Option(help="Or a CLIP or SigLIP tower alone: directory or hub id.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the frames artifacts.")] = Path("frames"),
    fps: Annotated[
        str | None,
        typer.Option(metavar="RATE|native", help="Frames a second by timestamp, or every frame.", show_default="1"),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Or this many frames, evenly spread.", min=1)] = None,
    frame_mode: Annotated[
        FrameModeChoice, typer.Option(help="Square by crop of the centre, pad with the mean colour, or squash.")
    ] = FrameModeChoice.crop,
    decoder: Annotated[
        DecoderChoice, typer.Option(help="auto is pyav, always exact; decord refuses videos that it gets wrong.")
    ] = DecoderChoice.auto,
    sampling: Annotated[
        SamplingChoice, typer.Option(help="keyframe takes the nearest key frames: fast, and off by up to seconds.")
    ] = SamplingChoice.exact,
    allow_partial: AllowPartialOption = False,
    hybrid: Annotated[
        str | None,
        typer.Option(metavar="L,M,S", help="One of L frames has M tokens, the others M/S: 4,144,3. Default: all M."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Videos decoded at once; they take turns at the tower.", min=1)] = 1,
    batch: Annotated[int, typer.Option(help="Frames through the tower at once.", min=1)] = 64,
    dtype: Annotated[
        DtypeChoice, typer.Option(help="Of the computation; auto: bfloat16 where the machine is fast with it.")
    ] = DtypeChoice.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    recipe: RecipeOption = None,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Sample a video's frames and store what a vision tower sees in them, one artifact a video.

    Writes DIR/NAME.frames.safetensors. A video that cannot be read is an error row; the others go on. Under torchrun,
    processes share the videos, and the rows come at the end.
    """
    if (model is None) == (tower is None):
        raise UsageError("give either --model or --tower")
    rate = parse_rate(fps)
    from lvctx.artifacts import schemas
    from lvctx.vlm.video_encoder import LONG_PATIENCE, Encoder, Hybrid, open_world

    encoder = Encoder.plan(
        str(model or tower),
        fps=rate,
        frames=frames,
        frame_mode=frame_mode.value,
        decoder=decoder.value,
        sampling=sampling.value,
        allow_partial=allow_partial,
        batch=batch,
        dtype=dtype.value,
        hybrid=Hybrid.parse(hybrid, "pair") if hybrid else None,
        device=device,
    )
    done = 0
    failures: list[LvctxError] = []
    opened = open_world(device=encoder.device, cp=1, patience=LONG_PATIENCE)
    with opened as world, progress("encode-video", quiet=quiet or dry_run or jobs > 1) as report:
        encoder.device = world.device

        def encode(share: Iterator[tuple[Path, dict[str, Any]]]) -> Iterator[Any]:
            if dry_run:
                return plans(encoder, share, out)
            options = {"resume": resume, "force": force, "report": report}
            share = counted(encoder, share) if encoder.config.hybrid else share
            return encoder.encode_all(share, out, jobs=jobs, processes=world.size, **options)

        for video, row, result in shared_out(references(videos), encode, world):
            if isinstance(result, LvctxError):
                say(f"lvctx: {result}")
                emit({**row, "schema": schemas.FRAMES, "path": str(video), "error": str(result)})
                failures.append(result)
            else:
                emit({**row, **result})
                done += 1
    if failures:
        raise typer.Exit(EXIT_SAMPLES_FAILED if done else failures[0].exit_code)


def shared_out(
    videos: Iterator[Any], encode: Callable[[Iterator[Any]], Iterator[Any]], world: "World"
) -> Iterator[Any]:
    """`encode` over all videos in their order: as they are done, or at the end where several processes share them."""
    if world.size == 1:
        yield from encode(videos)
        return
    from lvctx.vlm.video_encoder import share_videos

    # The first process alone reads stdin.
    todo = world.gather(list(videos) if world.rank == 0 else None)[0]
    mine = world.gather(share_videos(todo, world.size) if world.rank == 0 else None)[0][world.rank]
    results = list(zip(mine, encode(todo[i] for i in mine), strict=True))
    for _, result in sorted(chain.from_iterable(world.gather(results)), key=itemgetter(0)):
        yield result


def counted(encoder: Any, videos: Iterator[tuple[Path, dict[str, Any]]]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The videos, each once its tokens are told."""
    for video, row in videos:
        with suppress(LvctxError):  # its own turn will say it
            frames, exact, tokens = encoder.count(video)
            shown, nominal, about = tokens["visual_tokens"], tokens["nominal_tokens"], "" if exact else "about "
            say(f"lvctx: {video}: {about}{frames} frames, {shown:,} visual tokens (nominal {nominal:,}) and a newline")
        yield video, row


def plans(encoder: Any, videos: Iterator[tuple[Path, dict[str, Any]]], out: Path) -> Iterator[Any]:
    """What would be done with each video: video, row, plan or error."""
    for video, row in videos:
        try:
            plan = encoder.describe(video, out)
            if plan["about"]:
                say(f"lvctx: {video}: about {plan['expected_frames']} frames; only decoding would tell")
            yield video, row, {"dry_run": True, **plan}
        except LvctxError as e:
            yield video, row, e


def parse_rate(text: str | None) -> float | Literal["native"] | None:
    """`native`, a number such as 0.5, or a fraction such as 30000/1001. Raises UsageError for anything else."""
    if text is None or text == "native":
        return "native" if text else None
    try:
        rate = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        rate = 0.0
    if not 1e-5 <= rate <= 1e5:
        raise UsageError(f"no frame rate: {text}", where="--fps", fix="give a number such as 1, or native")
    return rate


def references(videos: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The videos with the rows they came in, if any: arguments, and lines of stdin where an argument is `-`."""
    from lvctx.artifacts.stream import read_references

    for video in videos:
        if video == "-":
            for path, row in read_references(sys.stdin):
                yield path, {key: value for key, value in row.items() if key not in ("path", "sha256")}
        else:
            yield Path(video), {}
