"""`lvctx niah haystack`: a haystack that may be passed on, the same pixels everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from lvctx.cli.common import (
    AllowPartialOption,
    ForceOption,
    QuietOption,
    Resume,
    ResumeOption,
    SeedOption,
    emit,
    progress,
)


def haystack(
    clips: Annotated[
        list[Path] | None, typer.Argument(metavar="[CLIP]...", help="Openly licensed videos, each shown once.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames in all, a second apart.", min=1)] = 3600,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="NAME.frames.safetensors (with --model), NAME.mp4, or a directory.")
    ] = Path("haystack"),
    model: Annotated[str | None, typer.Option(help="VLM or tower that looks at them: directory or hub id.")] = None,
    fps: Annotated[str, typer.Option(metavar="RATE|native", help="Frames a second taken of a clip.")] = "1",
    side: Annotated[int, typer.Option(help="Pixels of a drawn frame's side; even.", min=16, max=4096)] = 336,
    pixels: Annotated[
        Path | None, typer.Option(help="A .pixels.txt that the frames must agree with.", exists=True, dir_okay=False)
    ] = None,
    allow_partial: AllowPartialOption = False,
    batch: Annotated[int, typer.Option(help="Frames through the tower at once.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    seed: SeedOption = 0,
    resume: ResumeOption = Resume.auto,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Draw hours of footage from a seed and hash every frame; clips, if given, stand between its scenes.

    Frames stream into the tower: no video is stored. Two places have the same haystack where --pixels agrees.
    """
    from lvctx.cli.encode_video import parse_rate
    from lvctx.stages.haystack import HaystackConfig, write_haystack
    from lvctx.vlm.video_encoder import Encoder

    encoder = None if model is None else Encoder.plan(model, frame_mode="pad", batch=batch, device=device)
    rate = parse_rate(fps)
    config = HaystackConfig(
        frames=frames,
        seed=seed,
        side=side + side % 2,
        clips=tuple(clips or ()),
        fps=1.0 if rate is None else rate,
        allow_partial=allow_partial,
    )
    with progress("niah haystack", quiet=quiet) as report:
        row = write_haystack(
            config, out, encoder=encoder, pixels=pixels, resume=resume.value, force=force, report=report
        )
    emit(row)
