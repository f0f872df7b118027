"""Encode videos with a frozen vision tower: sampled frames in, one feature cache per video out.

Features are stored before any projector, so a new projector never invalidates them: the same tower in another VLM
reuses its artifacts. A separate process decodes ahead while the tower encodes batch by batch; several videos may be
decoded at once, and take turns at the tower. A batch holds frames of one video only, so the features of a video do not
depend on other videos.

Suffixes: N frames of a batch, S side in pixels, 3 the RGB channels.
"""

import contextlib
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image

from lvctx.artifacts import schemas
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import Provenance, is_finished, read_provenance
from lvctx.artifacts.store import read_safetensors_header, sha256_file
from lvctx.cost import CostMeter
from lvctx.device import Dtype, resolve_dtype
from lvctx.errors import DiskError, LvctxError, Stopped, UsageError, memory_errors
from lvctx.models.vision_encoder import Tower, TowerFiles
from lvctx.video.container import check_complete, probe
from lvctx.video.decode_worker import DecodeRequest, Decoders
from lvctx.video.frame_count import Count, bounded, count_frames, rough_count
from lvctx.video.hybrid import Hybrid, hybrid_tokens, select_high
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.feature_cache import SUFFIX, FeatureCache, open_frames
from lvctx.vlm.token_count import pooling

log = logging.getLogger(__name__)
CacheRow = dict[str, Any]
Batch = tuple[torch.Tensor, list[float], list[int], list[tuple[int, int]]]
FACTS = ("duration", "source_frames", "time_error", "visual_tokens", "nominal_tokens", "partial")
"""Fields of the sampling in a row."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The settings of a feature cache, besides video and tower."""

    sampling: VideoSampling
    """The sampling with its defaults: which frames, a frame mode, a decoder."""
    batch: int
    """Number of frames per batch of the tower; it affects rounding."""
    dtype: Literal["float32", "bfloat16"]
    """Data type of the tower's computation. Features are always stored as bfloat16."""

    @property
    def facts(self) -> dict[str, Any]:
        """The settings for provenance and rows."""
        return {"fps": None, "frames": None, **self.sampling.facts, "batch": self.batch, "dtype": self.dtype}


class VideoEncoder:
    """One tower and one sampling, for any number of videos. Weights are loaded for the first video that needs them."""

    def __init__(self, files: TowerFiles, config: EncoderConfig, *, device: str) -> None:
        self.files, self.config, self.device = files, config, device
        self._names: dict[str, str] = {}
        self._decoders, self._stop = Decoders(), threading.Event()
        self._turn, self._naming = threading.Lock(), threading.Lock()
        self._tower: Tower | None = None

    @classmethod
    def open(
        cls, name: str | Path, sampling: VideoSampling, *, batch: int = 64, dtype: Dtype = "auto", device: str = "cpu"
    ) -> Self:
        """Find the tower of a VLM, CLIP or SigLIP (directory or hub id) and resolve the defaults; loads no weights.

        Raises UsageError for a resolution that the tower does not support, InputError without a tower, MissingError
        without decord.
        """
        files = TowerFiles.find(name)
        sampling = resolve_for_tower(files, sampling)
        return cls(
            files, EncoderConfig(sampling=sampling, batch=batch, dtype=resolve_dtype(dtype, device)), device=device
        )

    def close(self) -> None:
        """Make encoding in other threads fail at its next batch, and end idle decoders."""
        self._stop.set()
        self._decoders.close()

    def encode_images(self, images: list[Image.Image] | np.ndarray, meter: CostMeter | None = None) -> torch.Tensor:
        """Features (N, P, D) of square images, in batches."""
        meter = meter or CostMeter()
        with self._turn:
            if self._tower is None:
                with meter.phase(None):
                    self._tower = Tower(self.files, dtype=getattr(torch, self.config.dtype), device=self.device)
            with meter.phase("encode"):
                return self._tower.encode_images(images, batch=self.config.batch)

    def provenance(self, video: Path) -> Provenance:
        """The provenance of the artifact of `video`."""
        return Provenance(
            schema=schemas.FRAMES_HYBRID if self.hybrid else schemas.FRAMES,
            command="encode-video",
            config=self.config.facts,
            inputs={"tower": self.files.fingerprint, "video": sha256_file(video)},
        )

    def target(self, video: Path, out: Path, fingerprint: str) -> Path:
        """`out`/NAME.frames.safetensors; further videos with the same NAME get part of their hash."""
        name = video.stem
        with self._naming:
            if self._names.setdefault(name, fingerprint) != fingerprint:
                name = f"{name}-{fingerprint[:8]}"
        return out / f"{name}{SUFFIX}"

    def describe(self, video: Path, out: Path) -> dict[str, Any]:
        """The result that `encode` would have: the resolved options, the target, and the predicted size in bytes.

        With `about`, frames and size are estimates; only decoding gives the exact numbers.
        """
        facts = probe(video)
        provenance = self.provenance(video)
        count = self._count(video)
        return {
            "video": str(video),
            "path": str(self.target(video, out, provenance.inputs["video"])),
            **self.config.facts,
            **facts,
            "duration": count.duration,
            "device": self.device,
            "expected_frames": count.frames,
            "about": not count.exact,
            "expected_bytes": count.frames * self.files.patches_per_frame * self.files.width * 2,
            **self.tokens(count.frames),
        }

    def count(self, video: Path) -> tuple[int, bool, dict[str, int]]:
        """Number of a video's sampled frames, whether it is exact, and their `tokens`. Raises InputError."""
        count = self._count(video)
        return count.frames, count.exact, self.tokens(count.frames)

    def _count(self, video: Path) -> Count:
        return count_frames(video, bounded(video, self.config.sampling), decode=False)

    @property
    def hybrid(self) -> Hybrid | None:
        """The hybrid resolution; None if all frames have the same."""
        return self.config.sampling.hybrid

    def tokens(self, frames: int) -> dict[str, int]:
        """Visual tokens of this number of hybrid-resolution frames, actual and nominal (L, m, s); otherwise empty.

        Also empty for adaptive selection, which depends on the content.
        """
        if self.hybrid is None or self.config.sampling.threshold is not None:
            return {}
        is_high = select_high(self.hybrid, merge=1)
        actual = sum(math.prod(self._grid(is_high(i, None))) for i in range(frames))
        return {"visual_tokens": actual, "nominal_tokens": hybrid_tokens(frames, self.hybrid, merge=1)}

    def _grid(self, high: bool) -> tuple[int, int]:
        """Rows and columns of the tokens of a frame of high or low resolution."""
        assert self.hybrid is not None
        side = math.isqrt(self.files.patches_per_frame)
        if high:
            return (math.ceil(side / 2),) * 2
        down, across = pooling(side, self.hybrid.ratio)
        return side // down, side // across

    def encode(
        self,
        video: Path,
        out: Path,
        *,
        resume: str = "auto",
        force: bool = False,
        threads: int | None = None,
        meter: CostMeter | None = None,
        on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
    ) -> dict[str, Any]:
        """Write the artifact of one video into `out`, unless it exists; returns its row.

        May run in several threads and processes at once: one writes an artifact, the others wait. `threads` is
        how many the decoder of this one uses (all cores by default).
        Raises InputError for a video that cannot be read (see `reader.read_video`); then no file is written.
        """
        check_complete(video, allow_partial=self.config.sampling.allow_partial)
        provenance = self.provenance(video)
        target = self.target(video, out, provenance.inputs["video"])
        with only_writer(out, name=f".{target.name}.lock", wait=True):
            if is_finished(target, provenance, resume=resume, force=force):
                log.info("%s: finished already", target)
                return _row(video, target)
            total = rough_count(video, self.config.sampling)
            on_progress(0, total, video.name)
            done = 0
            facts: dict[str, Any] = {"source": str(video)}
            with open_frames(target, provenance, facts) as writer:
                for features, pts, index, grids in self._batches(video, facts, meter or CostMeter(), threads):
                    writer.append(features, pts, index, grids)
                    done += len(pts)
                    on_progress(done, max(total, done), video.name)
            return _row(video, target)

    def read(self, video: Path, meter: CostMeter) -> FeatureCache:
        """The same in memory, for features that are not stored. Raises as `encode`."""
        check_complete(video, allow_partial=self.config.sampling.allow_partial)
        provenance = self.provenance(video)
        facts: dict[str, Any] = {"source": str(video)}
        features, pts, index, grids = zip(*self._batches(video, facts, meter), strict=True)
        grid = torch.tensor(list(chain.from_iterable(grids))) if self.hybrid else None
        return FeatureCache(
            features=torch.cat([batch.to("cpu", torch.bfloat16) for batch in features]),
            pts=torch.tensor(list(chain.from_iterable(pts)), dtype=torch.float64),
            index=torch.tensor(list(chain.from_iterable(index))),
            grid=grid,
            provenance={**provenance.to_dict(), "facts": facts},
        )

    def _batches(
        self, video: Path, facts: dict[str, Any], meter: CostMeter, threads: int | None = None
    ) -> Iterator[Batch]:
        """Features, times, numbers and token grids (None if all are the same) of the frames; fills `facts`."""
        sampling, preprocess = bounded(video, self.config.sampling), self.files.preprocess
        request = DecodeRequest(
            path=str(video), sampling=sampling, threads=threads, size=preprocess.size, background=preprocess.background
        )
        is_high = select_high(self.hybrid, merge=1, threshold=sampling.threshold) if self.hybrid else None
        done = tokens = nominal = 0
        with self._decoders.read(request, facts) as reader:
            frames = meter.decoding(reader)
            while batch := list(islice(frames, self.config.batch)):
                if self._stop.is_set():
                    raise Stopped
                features = self.encode_images(np.stack([frame.image for frame in batch]), meter)
                high = [is_high(done + i, frame.image) for i, frame in enumerate(batch)] if is_high else []
                grids = [self._grid(is_high_res) for is_high_res in high]
                yield features, [frame.pts for frame in batch], [frame.index for frame in batch], grids
                done, tokens = done + len(batch), tokens + sum(map(math.prod, grids))
                nominal += sum(
                    self.hybrid.tokens if is_high_res else self.hybrid.low_tokens for is_high_res in high if self.hybrid
                )
        if self.hybrid:
            facts |= {"visual_tokens": tokens, "nominal_tokens": nominal}

    def encode_all(
        self, videos: Iterable[tuple[Path, CacheRow]], out: Path, *, jobs: int, processes: int = 1, **options: Any
    ) -> Iterator[tuple[Path, CacheRow, CacheRow | LvctxError]]:
        """`encode` for each (video, row), `jobs` at once; video, row and result or error, in input order.

        The cores are divided among the decoders of `processes` such processes. Videos are taken from the iterable while
        others are encoded, so a slow producer does not delay them. Raises DiskError where the disk is full.
        """
        todo: queue.Queue[Any] = queue.Queue(jobs)
        threads = max(1, (os.cpu_count() or 1) // (jobs * processes))

        def encode_one(video: Path) -> CacheRow | LvctxError:
            try:
                with memory_errors(where=video, fix="use a smaller --batch or --jobs"):
                    return self.encode(video, out, threads=threads, **options)
            except LvctxError as e:
                if isinstance(e, DiskError):
                    raise
                return e

        def feed() -> None:
            try:
                for video, row in videos:
                    with contextlib.suppress(LvctxError, OSError):  # encode_one() will report it
                        self.target(video, out, self.provenance(video).inputs["video"])  # names depend on the order
                    todo.put((video, row, pool.submit(encode_one, video)))
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


def resolve_for_tower(files: TowerFiles, sampling: VideoSampling) -> VideoSampling:
    """The sampling with the defaults of a CLIP or SigLIP tower.

    Raises UsageError for a resolution that it does not support, MissingError without decord.
    """
    if sampling.decoder == "decord":
        from lvctx.video.decord_reader import require_decord

        require_decord()
    if sampling.hybrid_mode != "pair":
        raise UsageError("a CLIP or SigLIP tower does not merge frames", where="--hybrid-mode", fix="drop it")
    sampling.refuse_separator("features have none")
    hybrid = sampling.hybrid
    if hybrid is not None:
        if hybrid.tokens != files.tokens_per_frame:
            raise UsageError(f"m is {files.tokens_per_frame} for this tower, not {hybrid.tokens}", where="--hybrid")
        pooling(math.isqrt(files.patches_per_frame), hybrid.ratio)
    return replace(
        sampling,
        fps=1.0 if sampling.has_default_rate else sampling.fps,
        frame_mode=sampling.frame_mode or files.frame_mode,
        hybrid=None if hybrid is None or hybrid.uniform else hybrid,
        decoder="decord" if sampling.decoder == "decord" else "pyav",
    )


def _row(video: Path, target: Path) -> dict[str, Any]:
    provenance = read_provenance(target) or {}
    frames, features, width = read_safetensors_header(target)["features"]["shape"]
    tokens = provenance["facts"].get("visual_tokens")
    return {
        "schema": provenance["schema"],
        "path": str(target),
        "sha256": sha256_file(target),
        "video": str(video),
        "frames": frames,
        "tokens_per_frame": tokens / frames if tokens else math.ceil(math.isqrt(features) / 2) ** 2,
        "features_per_frame": features,
        "width": width,
        "fps": provenance["config"].get("fps"),
        "frame_mode": provenance["config"]["frame_mode"],
        **{key: provenance["facts"][key] for key in FACTS if key in provenance["facts"]},
        "corrupt_frames": provenance["facts"].get("corrupt", 0),
    }
