"""Watch videos with a frozen tower: sampled frames in, one frames artifact a video out.

The features are those before any projector, so a new projector never invalidates them: the same tower in another VLM
finds its artifacts finished. A process of its own decodes ahead while the tower encodes batch by batch; several videos
may be decoded at once, and take turns at the tower. A batch holds frames of one video, so the company that a video is
encoded in leaves no trace in its features.

Suffixes: N frames of a batch, S side in pixels, 3 the RGB channels.
"""

import contextlib
import logging
import math
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from lvctx.device import Dtype, resolve_device, resolve_dtype
from lvctx.dist.context import SHARED_WORK_TIMEOUT, ParallelContext, open_context
from lvctx.errors import LvctxError, Stopped, UsageError
from lvctx.vision.apart import Decoders, Request
from lvctx.vision.container import check_whole, probe
from lvctx.vision.decode import Count, Decoder, Rate, Sampling, count_frames
from lvctx.vision.hybrid import Hybrid, hybrid_tokens
from lvctx.vision.squares import FrameMode
from lvctx.vision.tokens import pooling
from lvctx.vision.tower import Tower, TowerFiles

__all__ = [
    "SHARED_WORK_TIMEOUT",
    "EncodeConfig",
    "Encoder",
    "Hybrid",
    "ParallelContext",
    "open_context",
    "share_videos",
]
log = logging.getLogger(__name__)
Row = dict[str, Any]
FACTS = ("duration", "source_frames", "time_error", "visual_tokens", "nominal_tokens", "partial")
"""What a row says of those in the artifact."""


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
    sampling: Sampling
    """`keyframe` takes the key frames nearest to the sampled ones; how far off they are is in the artifact's facts."""
    allow_partial: bool
    """Whether a video that is cut short, or of which more than 1% is damaged, is taken for what is left of it."""
    batch: int
    """Frames that go through the tower at once; it decides how sums are rounded."""
    dtype: Literal["float32", "bfloat16"]
    """What the tower computes in. Features are stored as bfloat16 either way."""
    hybrid: Hybrid | None = None
    """Which frames are pooled further when they are read (GIRAFFE section 3.5); None: none."""

    @property
    def facts(self) -> dict[str, Any]:
        """For provenance and rows; what was made before there was `hybrid` stands as it is."""
        facts = asdict(self)
        facts.pop("hybrid")
        if self.hybrid is not None:
            facts["hybrid"] = [self.hybrid.group, self.hybrid.tokens, self.hybrid.ratio]
        return facts


class Encoder:
    """One tower and one way to sample, for any number of videos. Weights are loaded with the first that needs them."""

    def __init__(self, files: TowerFiles, config: EncodeConfig, *, device: str) -> None:
        self.files, self.config, self.device = files, config, device
        self._names: dict[str, str] = {}
        self._hashes: dict[Path, str] = {}
        self._decoders, self._stop = Decoders(), threading.Event()
        self._turn, self._naming = threading.Lock(), threading.Lock()
        self._tower: Tower | None = None

    @classmethod
    def plan(
        cls,
        name: str,
        *,
        fps: Rate | None = None,
        frames: int | None = None,
        frame_mode: FrameMode = "crop",
        decoder: Decoder = "auto",
        sampling: Sampling = "exact",
        allow_partial: bool = False,
        batch: int = 64,
        dtype: Dtype = "auto",
        hybrid: Hybrid | None = None,
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
        device = resolve_device(device)
        config = EncodeConfig(
            fps=1.0 if fps is None and frames is None else fps,
            frames=frames,
            frame_mode=frame_mode,
            decoder="decord" if decoder == "decord" else "pyav",
            sampling=sampling,
            allow_partial=allow_partial,
            batch=batch,
            dtype=resolve_dtype(dtype, device),
            hybrid=None if hybrid is None or hybrid.uniform else hybrid,
        )
        files = TowerFiles.find(name)
        if hybrid is not None and hybrid.tokens != files.tokens_per_frame:
            raise UsageError(f"m is {files.tokens_per_frame} for this tower, not {hybrid.tokens}", where="--hybrid")
        if config.hybrid is not None:
            pooling(math.isqrt(files.patches_per_frame), config.hybrid.ratio)
        return cls(files, config, device=device)

    def close(self) -> None:
        """Let videos that are being encoded in other threads fail at their next batch, and end idle decoders."""
        self._stop.set()
        self._decoders.close()

    def see(self, images: list[Image.Image] | np.ndarray) -> torch.Tensor:
        """Features (N, P, D) of square images, in batches."""
        with self._turn:
            if self._tower is None:
                self._tower = Tower(self.files, dtype=getattr(torch, self.config.dtype), device=self.device)
            return self._tower.see(images, batch=self.config.batch)

    def provenance(self, video: Path) -> Provenance:
        """What will have made the artifact of `video`."""
        fingerprint = self._hashes[video] = self._hashes.get(video) or sha256_file(video)
        return Provenance(
            schema=schemas.FRAMES_HYBRID if self.config.hybrid else schemas.FRAMES,
            command="encode-video",
            config=self.config.facts,
            inputs={"tower": self.files.fingerprint, "video": fingerprint},
        )

    def target(self, video: Path, out: Path, fingerprint: str) -> Path:
        """`out`/NAME.frames.safetensors; of several videos called NAME all but the first get part of their hash."""
        name = video.stem
        with self._naming:
            if self._names.setdefault(name, fingerprint) != fingerprint:
                name = f"{name}-{fingerprint[:8]}"
        return out / f"{name}{SUFFIX}"

    def describe(self, video: Path, out: Path) -> dict[str, Any]:
        """What `encode` would do: the resolved options, the target, and the bytes that it predicts.

        `about`: the frames, and so the bytes, are near; only decoding would tell.
        """
        facts = probe(video)
        made = self.provenance(video)
        count = self._count(video)
        size = count.frames * self.files.patches_per_frame * self.files.width * 2
        return {
            "video": str(video),
            "path": str(self.target(video, out, made.inputs["video"])),
            **self.config.facts,
            **facts,
            "duration": count.duration,
            "device": self.device,
            "expected_frames": count.frames,
            "about": not count.exact,
            "expected_bytes": size,
            **self.tokens(count.frames),
        }

    def count(self, video: Path) -> tuple[int, bool, dict[str, int]]:
        """Frames that a video will have, whether exactly, and their `tokens`. Raises InputError."""
        count = self._count(video)
        return count.frames, count.exact, self.tokens(count.frames)

    def _count(self, video: Path) -> Count:
        config = self.config
        return count_frames(
            video, fps=config.fps, frames=config.frames, decode=False, allow_partial=config.allow_partial
        )

    def tokens(self, frames: int) -> dict[str, int]:
        """Visual tokens of so many frames of hybrid resolution, as they will be and by L, m, s; else nothing."""
        if self.config.hybrid is None:
            return {}
        actual = sum(rows * columns for rows, columns in self._grids(0, frames))
        return {"visual_tokens": actual, "nominal_tokens": hybrid_tokens(frames, self.config.hybrid, merge=1)}

    def _grids(self, first: int, count: int) -> list[tuple[int, int]]:
        """Rows and columns of the tokens of `count` sampled frames from the given one on: nothing if all are alike."""
        if self.config.hybrid is None:
            return []
        side = math.isqrt(self.files.patches_per_frame)
        down, across = pooling(side, self.config.hybrid.ratio)
        high, low = (math.ceil(side / 2),) * 2, (side // down, side // across)
        return [low if i % self.config.hybrid.group else high for i in range(first, first + count)]

    def encode(
        self,
        video: Path,
        out: Path,
        *,
        resume: str = "auto",
        force: bool = False,
        threads: int | None = None,
        report: Callable[[int, int, str], None] = lambda done, total, note: None,
    ) -> dict[str, Any]:
        """Write the artifact of one video into `out`, unless it stands already; the row that describes it.

        May run in several threads at once; `threads` is how many the decoder of this one uses (all cores unless given).
        Raises InputError for a video that cannot be read (see `decode.read_frames`); nothing is left under its name.
        """
        config, preprocess = self.config, self.files.preprocess
        check_whole(video, allow_partial=config.allow_partial)
        made = self.provenance(video)
        target = self.target(video, out, made.inputs["video"])
        if is_finished(target, made, resume=resume, force=force):
            log.info("%s: finished already", target)
            return _row(video, target)
        total = self._rough_total(video)
        request = Request(
            path=str(video),
            fps=config.fps,
            frames=config.frames,
            decoder=config.decoder,
            sampling=config.sampling,
            allow_partial=config.allow_partial,
            threads=threads,
            size=preprocess.size,
            mode=config.frame_mode,
            background=preprocess.background,
        )
        report(0, total, video.name)
        done = 0
        facts: dict[str, Any] = {"source": str(video)}
        with open_frames(target, made, facts) as writer, self._decoders.read(request, facts) as frames:
            while batch := list(islice(frames, config.batch)):
                if self._stop.is_set():
                    raise Stopped
                features = self.see(np.stack([frame.image for frame in batch]))
                grids = self._grids(done, len(batch))
                writer.append(features, [frame.pts for frame in batch], [frame.index for frame in batch], grids)
                done += len(batch)
                report(done, max(total, done), video.name)
            facts |= self.tokens(done)
        return _row(video, target)

    def encode_all(
        self, videos: Iterable[tuple[Path, Row]], out: Path, *, jobs: int, processes: int = 1, **options: Any
    ) -> Iterator[tuple[Path, Row, Row | LvctxError]]:
        """`encode` for each (video, row), `jobs` at once; video, row and result or error, in the order they came.

        The decoders of `processes` like this one share the machine.

        Videos are read from the iterable while others are encoded, so a slow producer holds nothing back.
        """
        todo: queue.Queue[Any] = queue.Queue(jobs)
        threads = max(1, (os.cpu_count() or 1) // (jobs * processes))

        def one(video: Path) -> Row | LvctxError:
            try:
                return self.encode(video, out, threads=threads, **options)
            except LvctxError as e:
                return e

        def feed() -> None:
            try:
                for video, row in videos:
                    with contextlib.suppress(LvctxError, OSError):  # one() will say it
                        self.target(video, out, self.provenance(video).inputs["video"])  # names go by order
                    todo.put((video, row, pool.submit(one, video)))
                todo.put(None)
            except BaseException as e:
                todo.put(e)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                threading.Thread(target=feed, daemon=True).start()
                while (item := todo.get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    yield item[0], item[1], item[2].result()
            finally:
                self.close()
                pool.shutdown(wait=False, cancel_futures=True)

    def _rough_total(self, video: Path) -> int:
        """For progress, which must not read the file first."""
        if self.config.frames is not None:
            return self.config.frames
        facts = probe(video)
        rate = facts["source_fps"] if self.config.fps == "native" else self.config.fps
        return max(1, math.ceil(facts["duration"] * rate))


def share_videos(videos: Sequence[tuple[Path, Row]], processes: int) -> list[list[int]]:
    """Indices of the videos that each process encodes, in order; the largest files go first to whom has least.

    Videos called alike stay together: which of them gets the plain name is for one process to say.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for i, (video, _) in enumerate(videos):
        groups[video.stem].append(i)
        sizes[video.stem] += video.stat().st_size if video.is_file() else 0
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for stem in sorted(groups, key=lambda s: (-sizes[s], groups[s])):
        least = loads.index(min(loads))
        shares[least] += groups[stem]
        loads[least] += sizes[stem] + 1
    return [sorted(share) for share in shares]


def _row(video: Path, target: Path) -> dict[str, Any]:
    made = read_provenance(target) or {}
    frames, features, width = read_safetensors_header(target)["features"]["shape"]
    tokens = made["facts"].get("visual_tokens")
    return {
        "schema": made["schema"],
        "path": str(target),
        "sha256": sha256_file(target),
        "video": str(video),
        "frames": frames,
        "tokens_per_frame": tokens / frames if tokens else math.ceil(math.isqrt(features) / 2) ** 2,
        "features_per_frame": features,
        "width": width,
        "fps": made["config"]["fps"],
        "frame_mode": made["config"]["frame_mode"],
        **{key: made["facts"][key] for key in FACTS if key in made["facts"]},
        "corrupt_frames": made["facts"].get("corrupt", 0),
    }
