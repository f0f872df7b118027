"""How a benchmark's model sees a video or pictures: encoded frames for a LlavaOnevision, the files for Qwen-VL."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from lvctx.artifacts.frames import read_frames
from lvctx.artifacts.store import sha256_file
from lvctx.errors import UsageError
from lvctx.model.load import VLM_TYPE, DeviceMap, load_config, resolve_model
from lvctx.model.qwen_vl import TIMED, TYPES
from lvctx.stages.asker import Asker
from lvctx.stages.encode import Encoder
from lvctx.stages.qwen_asker import QwenAsker, Viewing
from lvctx.train.images import Encoding
from lvctx.vision.decode import Rate
from lvctx.vision.film import check_reachable
from lvctx.vision.hybrid import Hybrid
from lvctx.vision.squares import FrameMode


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A video that a model is being asked about."""

    pts: list[float]
    """When each sampled frame is shown, in seconds."""
    facts: dict[str, Any]
    """What a row says of it."""


class Look(Protocol):
    """A model's way to see."""

    sampler: dict[str, Any]
    """What decides which pixels it sees of a video."""
    pictures: dict[str, Any]
    """What decides which pixels it sees of a picture."""

    def open(self, path: Path, *, device: str, device_map: DeviceMap | None, chunk: int, reuse: bool) -> Any:
        """The loaded model of a resolved directory, for `video` and `images`."""

    def video(self, asker: Any, file: Path) -> Watched:
        """Show a video. Raises InputError where it is broken."""

    def images(self, asker: Any, images: Sequence[Image.Image]) -> None:
        """Show RGB pictures."""


def find_look(
    model: str,
    *,
    fps: Rate | None,
    frames: int | None,
    frame_mode: FrameMode | None,
    hybrid: Hybrid | None,
    allow_partial: bool,
    frames_dir: Path,
    device: str,
) -> Look:
    """The way to see of a model; loads no weights. `frame_mode` is for towers that see squares.

    Raises UsageError for a model that cannot see, for a resolution that it cannot have, and for flags that it has no
    use for.
    """
    path = resolve_model(model)
    kind = load_config(path).model_type
    if kind in TYPES + TIMED:
        if fps == "native" or frame_mode is not None:
            raise UsageError("Qwen-VL takes frames whole, at a rate", fix="drop --frame-mode; give --fps a number")
        check_reachable(hybrid or Hybrid())
        rate = Viewing.fps if fps is None else float(fps)
        return FilmLook(Viewing(fps=rate, frames=frames, hybrid=hybrid or Hybrid(), allow_partial=allow_partial))
    if kind != VLM_TYPE:
        raise UsageError(f"{model} is a {kind} model", fix="give a VLM that lvctx align wrote, or a Qwen2-VL")
    if hybrid is not None and hybrid.mode != "pair":
        raise UsageError(f"{model} merges no frames", fix="drop --hybrid-mode")
    mode = frame_mode or "crop"
    how: dict[str, Any] = {"frame_mode": mode, "hybrid": hybrid, "allow_partial": allow_partial}
    encoder = Encoder.plan(model, fps=fps, frames=frames, device=device, **how)
    return TowerLook(encoder, frames_dir, Encoding.told(load_config(path)))


class TowerLook:
    """A tower's features of square frames, in artifacts that stay; pictures as `align` showed them."""

    def __init__(self, encoder: Encoder, frames_dir: Path, images: Encoding) -> None:
        self.encoder, self.frames_dir = encoder, frames_dir
        self.sampler = encoder.config.facts
        self.pictures = {"image_grid": images.grid, "grid_rule": images.rule, "max_grids": images.max_grids}

    def open(self, path: Path, *, device: str, device_map: DeviceMap | None, chunk: int, reuse: bool) -> Asker:
        """See `Look`."""
        return Asker(path, device=device, chunk=chunk, reuse=reuse, device_map=device_map)

    def video(self, asker: Asker, file: Path) -> Watched:
        """See `Look`."""
        made = self.encoder.encode(file, self.frames_dir)
        frames = read_frames(Path(made["path"]))
        asker.show(frames.features, frames.grid)
        facts = {
            "video_sha256": frames.provenance["inputs"]["video"][:16],
            "frames": len(frames.pts),
            "visual_tokens": len(asker.block) - 1,
            "corrupt_frames": made["corrupt_frames"],
            **({"partial": True} if made.get("partial") else {}),
        }
        return Watched(pts=frames.pts.tolist(), facts=facts)

    def images(self, asker: Asker, images: Sequence[Image.Image]) -> None:
        """See `Look`."""
        asker.show_images(images)


class FilmLook:
    """Qwen-VL's own tower on whole frames."""

    def __init__(self, viewing: Viewing) -> None:
        self.viewing, self.sampler = viewing, viewing.facts
        self.pictures = {"image_grid": "whole"}

    def open(self, path: Path, *, device: str, device_map: DeviceMap | None, chunk: int, reuse: bool) -> QwenAsker:
        """See `Look`."""
        options: dict[str, Any] = {"device": device, "device_map": device_map, "chunk": chunk, "reuse": reuse}
        return QwenAsker(path, viewing=self.viewing, **options)

    def video(self, asker: QwenAsker, file: Path) -> Watched:
        """See `Look`."""
        film, found = asker.watch(file)
        facts = {
            "video_sha256": sha256_file(file)[:16],
            "frames": len(film.frames),
            "high_frames": sum(film.high),
            "visual_tokens": sum(block.tokens for block in film.blocks),
            "frame_size": list(film.frames[0].size),
            "corrupt_frames": found.get("corrupt", 0),
            **({"partial": True} if found.get("partial") else {}),
        }
        return Watched(pts=film.pts, facts=facts)

    def images(self, asker: QwenAsker, images: Sequence[Image.Image]) -> None:
        """See `Look`."""
        asker.show_images(images)
