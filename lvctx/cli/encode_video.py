"""`lvctx encode-video`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lvctx.artifacts import schemas
from lvctx.cli.options import RunOptions, command
from lvctx.cli.output import emit, progress, say
from lvctx.config import Flag
from lvctx.device import Dtype
from lvctx.errors import EXIT_SAMPLES_FAILED, LvctxError, UsageError
from lvctx.video.sampling import VideoSampling

if TYPE_CHECKING:
    from lvctx.parallel.context import ParallelContext
    from lvctx.vlm.video_encoder import VideoEncoder

JsonRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EncodeVideoConfig:
    """The videos to encode, and the vision tower."""

    videos: Annotated[tuple[str, ...], Flag(argument=True, metavar="VIDEO...")]
    """Video files; - reads them from stdin."""
    model: str | None = None
    """VLM whose vision tower is used: directory or hub id."""
    tower: str | None = None
    """CLIP or SigLIP vision tower, instead of --model: directory or hub id."""
    out: Annotated[Path, Flag(names=("-o", "--out"))] = Path("frames")
    """Directory of the feature caches."""
    jobs: Annotated[int, Flag(min=1)] = 1
    """Videos decoded at the same time."""
    batch: Annotated[int, Flag(min=1)] = 64
    """Frames per forward pass of the vision tower."""
    dtype: Dtype = "auto"
    """Data type of the computation. auto is bfloat16 if the device supports it natively."""
    device: str = "auto"
    """Device: cpu, cuda or mps. auto takes the first GPU, else the CPU."""


@command(
    "encode-video",
    "lvctx encode-video clips/bikes.mp4 --model vlm --fps 2 -o frames-2fps",
    "ls clips/*.mp4 | lvctx encode-video - --model vlm --frames 4 -o frames-4",
)
def encode_video(config: EncodeVideoConfig, sampling: VideoSampling, run: RunOptions) -> None:
    """Sample videos and store the vision tower's features of their frames.

    Writes OUT/NAME.frames.safetensors for each video. A video that cannot be read is an error row; the others continue.
    Under torchrun the videos are divided among the processes, and the rows are printed at the end.
    """
    if (config.model is None) == (config.tower is None):
        raise UsageError("give either --model or --tower")
    from lvctx.parallel.context import SHARED_WORK_TIMEOUT, open_context
    from lvctx.vlm.video_encoder import VideoEncoder

    done = exit_code = 0
    opened = open_context(device=config.device, cp=1, timeout=SHARED_WORK_TIMEOUT)
    with opened as parallel, progress("encode-video", "finding the vision tower") as on_progress:
        encoder = VideoEncoder.open(
            str(config.model or config.tower), sampling, batch=config.batch, dtype=config.dtype, device=parallel.device
        )

        def encode(share: Iterator[tuple[Path, JsonRow]]) -> Iterator[Any]:
            if run.dry_run:
                return _describe(encoder, share, config.out)
            on_video_progress = on_progress if config.jobs == 1 else lambda done, total, note: None
            options = {"resume": run.resume, "force": run.force, "on_progress": on_video_progress}
            share = _count_tokens(encoder, share) if encoder.hybrid else share
            return encoder.encode_all(share, config.out, jobs=config.jobs, processes=parallel.size, **options)

        for video, row, result in _share_out(_references(config.videos), encode, parallel):
            if isinstance(result, LvctxError):
                say(f"lvctx: {result}")
                emit({**row, "schema": schemas.FRAMES, "path": str(video), "error": str(result)})
                exit_code = exit_code or result.exit_code  # an error kept here would keep its frames
            else:
                emit({**row, **result}, None if run.dry_run else _one_line(video, result))
                done += 1
    if exit_code:
        raise typer.Exit(EXIT_SAMPLES_FAILED if done else exit_code)


def _one_line(video: Path, row: JsonRow) -> str:
    damage = f", {row['corrupt_frames']} damaged" if row["corrupt_frames"] else ""
    return f"{video}: {row['frames']:,} frames{damage} -> {row['path']}"


def _share_out(
    videos: Iterator[Any], encode: Callable[[Iterator[Any]], Iterator[Any]], parallel: "ParallelContext"
) -> Iterator[Any]:
    """`encode` over all videos in their order: as they finish, or at the end if several processes share them."""
    if parallel.size == 1:
        yield from encode(videos)
        return
    from lvctx.parallel.work_shares import share_videos

    # Only the first process reads stdin.
    todo = parallel.gather(list(videos) if parallel.rank == 0 else None)[0]
    assigned = parallel.gather(share_videos(todo, parallel.size) if parallel.rank == 0 else None)[0][parallel.rank]
    results = list(zip(assigned, encode(todo[i] for i in assigned), strict=True))
    for _, result in sorted(chain.from_iterable(parallel.gather(results)), key=itemgetter(0)):
        yield result


def _count_tokens(encoder: "VideoEncoder", videos: Iterator[tuple[Path, JsonRow]]) -> Iterator[tuple[Path, JsonRow]]:
    """The videos; prints the number of tokens of each before it is encoded."""
    for video, row in videos:
        with suppress(LvctxError):  # encoding it will report the error
            frames, exact, tokens = encoder.count(video)
            if tokens:
                actual, nominal, about = tokens["visual_tokens"], tokens["nominal_tokens"], "" if exact else "about "
                what = f"{actual:,} visual tokens (nominal {nominal:,}) and a newline"
                say(f"lvctx: {video}: {about}{frames} frames, {what}")
        yield video, row


def _describe(encoder: "VideoEncoder", videos: Iterator[tuple[Path, JsonRow]], out: Path) -> Iterator[Any]:
    """The dry run of each video: video, row, plan or error."""
    for video, row in videos:
        try:
            plan = encoder.describe(video, out)
            if plan["about"]:
                say(f"lvctx: {video}: about {plan['expected_frames']} frames; only decoding gives the exact number")
            yield video, row, {"dry_run": True, **plan}
        except LvctxError as e:
            yield video, row, e


def _references(videos: tuple[str, ...]) -> Iterator[tuple[Path, JsonRow]]:
    """The videos with their input rows, if any: from arguments, and from lines of stdin for `-`."""
    from lvctx.artifacts.stream import read_references

    for video in videos:
        if video == "-":
            for path, row in read_references(sys.stdin):
                yield path, {key: value for key, value in row.items() if key not in ("path", "sha256")}
        else:
            yield Path(video), {}
