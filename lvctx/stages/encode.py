"""Watch videos with a frozen tower: sampled frames in, one frames artifact a video out.

The features are those before any projector, so a new projector never invalidates them: the same tower in another VLM
finds its artifacts finished. Frames are decoded in one thread while the tower encodes in another, batch by batch.

Suffixes: N frames of a batch, S side in pixels, 3 the RGB channels.
"""

import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image

from lvctx.artifacts import schemas
from lvctx.artifacts.frames import SUFFIX, open_frames
from lvctx.artifacts.manifest import Provenance, is_finished, read_provenance
from lvctx.artifacts.store import read_safetensors_header, sha256_file
from lvctx.errors import MissingError, UsageError
from lvctx.vision.decode import Decoder, Frame, FrameReader, Rate, check_whole, probe, read_frames
from lvctx.vision.images import FrameMode, Preprocess
from lvctx.vision.tower import Tower, TowerFiles

log = logging.getLogger(__name__)
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What decides a frames artifact, besides video and tower."""

    fps: Rate | None
    """Frames a second by timestamp, or `native` for every frame; LongVA 1 on V-NIAH. None where `frames` is given."""
    frames: int | None
    """Number of frames spread evenly; LongVA 8 to 384 on Video-MME."""
    frame_mode: FrameMode
    """How a frame becomes a square; LongVA `pad` on V-NIAH, `crop` on VQA and Video-MME."""
    decoder: Literal["pyav", "decord"]
    """What read the video."""
    batch: int
    """Frames that go through the tower at once; it decides how sums are rounded."""
    dtype: Literal["float32", "bfloat16"]
    """What the tower computes in. Features are stored as bfloat16 either way."""


class Encoder:
    """One tower and one way to sample, for any number of videos. Weights are loaded with the first that needs them."""

    def __init__(self, files: TowerFiles, config: EncodeConfig, *, device: str) -> None:
        self.files, self.config, self.device = files, config, device
        self._names: dict[str, str] = {}

    @classmethod
    def plan(
        cls,
        name: str,
        *,
        fps: Rate | None = None,
        frames: int | None = None,
        frame_mode: FrameMode = "crop",
        decoder: Decoder = "auto",
        batch: int = 64,
        dtype: Dtype = "auto",
        device: str = "auto",
    ) -> Self:
        """Find the tower of a VLM, CLIP or SigLIP (directory or hub id) and resolve the defaults; loads no weights.

        Raises UsageError for contradicting options, InputError without a tower, MissingError without decord or device.
        """
        if fps is not None and frames is not None:
            raise UsageError("give --fps or --frames, not both")
        if decoder == "decord":
            from lvctx.vision.decord import require_decord

            require_decord()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise MissingError("no CUDA device here", where=f"--device {device}", fix="--device cpu")
        config = EncodeConfig(
            fps=1.0 if fps is None and frames is None else fps,
            frames=frames,
            frame_mode=frame_mode,
            decoder="decord" if decoder == "decord" else "pyav",
            batch=batch,
            dtype=dtype if dtype != "auto" else "bfloat16" if _fast_bfloat16(device) else "float32",
        )
        return cls(TowerFiles.find(name), config, device=device)

    @cached_property
    def tower(self) -> Tower:
        """The tower, loaded."""
        return Tower(self.files, dtype=getattr(torch, self.config.dtype), device=self.device)

    def provenance(self, video: Path) -> Provenance:
        """What will have made the artifact of `video`."""
        return Provenance(
            schema=schemas.FRAMES,
            command="encode-video",
            config=asdict(self.config),
            inputs={"tower": self.files.fingerprint, "video": sha256_file(video)},
        )

    def target(self, video: Path, out: Path, fingerprint: str) -> Path:
        """`out`/NAME.frames.safetensors; of several videos called NAME all but the first get part of their hash."""
        name = video.stem
        if self._names.setdefault(name, fingerprint) != fingerprint:
            name = f"{name}-{fingerprint[:8]}"
        return out / f"{name}{SUFFIX}"

    def describe(self, video: Path, out: Path) -> dict[str, Any]:
        """What `encode` would do: the resolved options, the target, and the bytes that it predicts."""
        facts = probe(video)
        made = self.provenance(video)
        frames = self._expected_frames(facts)
        size = frames * self.files.patches_per_frame * self.files.width * 2
        return {
            "video": str(video),
            "path": str(self.target(video, out, made.inputs["video"])),
            **asdict(self.config),
            **facts,
            "device": self.device,
            "expected_frames": frames,
            "expected_bytes": size,
        }

    def encode(
        self,
        video: Path,
        out: Path,
        *,
        resume: str = "auto",
        force: bool = False,
        report: Callable[[int, int, str], None] = lambda done, total, note: None,
    ) -> dict[str, Any]:
        """Write the artifact of one video into `out`, unless it stands already; the row that describes it.

        Raises InputError for a video that cannot be read (see `decode.read_frames`); nothing is left under its name.
        """
        check_whole(video)
        made = self.provenance(video)
        target = self.target(video, out, made.inputs["video"])
        if is_finished(target, made, resume=resume, force=force):
            log.info("%s: finished already", target)
            return _row(video, target)
        config, preprocess = self.config, self.files.preprocess
        total = self._expected_frames(probe(video))
        reader = read_frames(video, fps=config.fps, frames=config.frames, decoder=config.decoder)
        report(0, total, video.name)
        done = 0
        with open_frames(target, made, reader.facts) as writer, _Ahead(reader, preprocess, config) as squares:
            while batch := list(islice(squares, config.batch)):
                images_NSS3 = np.stack([image for _, _, image in batch])
                features = self.tower.see(images_NSS3, batch=config.batch)
                writer.append(features, [pts for _, pts, _ in batch], [index for index, _, _ in batch])
                done += len(batch)
                report(done, max(total, done), video.name)
        return _row(video, target)

    def _expected_frames(self, facts: dict[str, Any]) -> int:
        if self.config.frames is not None:
            return self.config.frames
        rate = facts["source_fps"] if self.config.fps == "native" else self.config.fps
        return max(1, math.ceil(facts["duration"] * rate))


def _row(video: Path, target: Path) -> dict[str, Any]:
    made = read_provenance(target) or {}
    frames, features, width = read_safetensors_header(target)["features"]["shape"]
    return {
        "schema": schemas.FRAMES,
        "path": str(target),
        "sha256": sha256_file(target),
        "video": str(video),
        "frames": frames,
        "tokens_per_frame": math.ceil(math.isqrt(features) / 2) ** 2,
        "features_per_frame": features,
        "width": width,
        "fps": made["config"]["fps"],
        "frame_mode": made["config"]["frame_mode"],
        **{key: made["facts"][key] for key in ("duration", "source_frames") if key in made["facts"]},
        "corrupt_frames": made["facts"].get("corrupt", 0),
    }


def _fast_bfloat16(device: str) -> bool:
    if device != "cpu":
        return True
    # Without such instructions a CPU emulates bfloat16, several times slower than float32.
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


Square = tuple[int, float, np.ndarray]
"""Index, pts, and uint8 (S, S, 3)."""


class _Ahead(Iterator[Square]):
    """Decodes and squares frames in a thread of its own, at most two batches ahead of the tower."""

    def __init__(self, reader: FrameReader, preprocess: Preprocess, config: EncodeConfig) -> None:
        self._reader, self._preprocess, self._mode = reader, preprocess, config.frame_mode
        self._queue: queue.Queue[Square | BaseException | None] = queue.Queue(maxsize=2 * config.batch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for frame in self._reader:
                self._put(self._square(frame))
                if self._stop.is_set():
                    return
        except BaseException as e:
            last = e
        self._put(last)

    def _square(self, frame: Frame) -> Square:
        image = self._preprocess.square(Image.fromarray(frame.image), self._mode)
        return frame.index, frame.pts, np.asarray(image)

    def _put(self, item: Square | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __next__(self) -> Square:
        item = self._queue.get()
        if item is None:
            self._queue.put(None)  # an exhausted iterator stays exhausted
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item
