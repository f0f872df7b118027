"""Small images for the report: frames that a model was shown, needles, and the frames around them.

The rows of a run only name files. An image that cannot be had any more, because its file is gone or is not readable, is
left out.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lvctx.artifacts.manifest import read_provenance
from lvctx.config import OnProgress
from lvctx.errors import InputError
from lvctx.eval.niah.frame_needles import FrameNeedles
from lvctx.eval.niah.needle_sets import find_needles
from lvctx.eval.niah.niah_config import VideoNiahConfig
from lvctx.models.image_processing import open_image
from lvctx.video.container import decoder_errors
from lvctx.video.frame_count import bounded
from lvctx.video.frame_selection import frame_numbers, spread
from lvctx.video.packet_index import PacketIndex, read_packets
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.contact_sheet import find_source
from lvctx.vlm.haystack_files import list_images

SIDE, QUALITY = 160, 60
"""Longest side of an image in pixels, and its JPEG quality: 3 to 5 kB."""
MOST_IMAGES = 1200
"""Images of a report, which bound its size to some 6 MB and the time to write it."""
SAMPLING = ("fps", "frames", "max_frames", "start", "end")
"""Fields of `VideoSampling` that decide which frames a model was shown."""
CHOSEN = ("distractors", "question", "count", "needle_frames")
"""Options that decide which needles there are, as rows have them."""
UNUSABLE = (ValueError, TypeError, KeyError, ArithmeticError, MemoryError, OSError)
"""What files and values that rows name may raise: an image is then left out."""


class Thumbnails:
    """The images of a report; rows refer to them by their number."""

    def __init__(self, per_video: int, on_progress: OnProgress) -> None:
        """`per_video` images of each video, evenly spread over the frames that the model was shown; 0 for none."""
        self.per_video, self.on_progress = per_video, on_progress
        self.images: list[dict[str, Any]] = []
        """`jpeg` (base64) and `seconds`, the frame's time in its video, or None."""
        self.videos: dict[str, list[int]] = {}
        """Images of each video, by file and sampling; none where it could not be read or the report is full."""

    @property
    def full(self) -> bool:
        """Whether no further image is taken."""
        return self.per_video == 0 or len(self.images) >= MOST_IMAGES

    def _add(self, image: Image.Image, seconds: float | None = None) -> int:
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="jpeg", quality=QUALITY, optimize=True)
        jpeg = base64.b64encode(buffer.getvalue()).decode()
        self.images.append({"jpeg": jpeg, "seconds": None if seconds is None else round(seconds, 3)})
        return len(self.images) - 1

    def of_video(self, file: str, *, pts: Sequence[float] = (), sampling: Mapping[str, Any] | None = None) -> list[int]:
        """Images of a video or frames artifact: of the frames at `pts` (seconds), else of those that `sampling` takes.

        An empty list where they cannot be read.
        """
        key = json.dumps([file, list(pts), sampling], default=str)
        if key not in self.videos:
            self.videos[key] = []
            if not self.full:
                self.on_progress(len(self.videos), 0, Path(file).name)
                try:
                    frames = list(_read_frames(Path(file), self.per_video, pts, sampling or {}))
                except UNUSABLE:
                    frames = []
                self.videos[key] = [self._add(Image.fromarray(image), seconds) for seconds, image in frames]
        return self.videos[key]

    def of_needles(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Hash of a trial's needles -> the first one's image, drawn again or read from its folder."""
        source = rows[0].get("needles")
        if self.full or not isinstance(source, dict):
            return {}
        try:
            count, size = 1 + max(row["trial"] for row in rows), source["size"]
            chosen = {name: source[name] for name in CHOSEN if name in source}
            images = count * chosen.get("count", 1) * chosen.get("needle_frames", 1) + chosen.get("distractors", 0)
            if images > MOST_IMAGES or not 0 < size <= 4096:
                return {}
            config = VideoNiahConfig(
                model="",
                haystack=(),
                lengths=(1,),
                needles=source["source"],
                trials=count,
                seed=rows[0]["made_of"]["seed"],
                **chosen,
            )
            task = FrameNeedles(find_needles(config, size), seconds=np.zeros(1), question=config.question)
            found = {task.digest(trial): task.first_image(trial) for trial in range(min(count, task.trials))}
        except UNUSABLE:
            return {}
        wanted = {row.get("needle") for row in rows}
        shown = {digest: image for digest, image in found.items() if digest in wanted and image is not None}
        return {digest: self._add(image.copy()) for digest, image in shown.items() if not self.full}

    def of_haystack(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """Number of a haystack's frame -> its image, for the frames before and after every needle's position."""
        files = rows[0].get("haystack")
        if self.full or rows[0].get("modality") != "video" or not isinstance(files, list) or len(files) != 1:
            return {}
        numbers = {n for row in rows for n in (row["position"] - 1, row["position"]) if 0 <= n < row["length"]}
        visual = rows[0].get("visual")
        fps = visual.get("fps") if isinstance(visual, dict) else None
        try:
            found = list(_read_haystack(Path(str(files[0])), sorted(numbers), fps if isinstance(fps, float) else 1.0))
        except UNUSABLE:
            return {}
        return {number: self._add(image, seconds) for number, seconds, image in found if not self.full}


def _read_frames(
    path: Path, count: int, pts: Sequence[float], sampling: Mapping[str, Any]
) -> Iterator[tuple[float, np.ndarray]]:
    """Time and pixels of at most `count` of the frames that a model was shown. Raises InputError and UsageError."""
    if path.suffix == ".safetensors":
        video, indices = _of_artifact(path)
        yield from _numbered(video, _thinned(indices, count))
        return
    index = _index(path)
    taken = {key: sampling[key] for key in SAMPLING if sampling.get(key) is not None}
    if index is None:  # only decoding gives its frames
        frames = read_video(path, VideoSampling(frames=count, allow_partial=True))
        yield from ((frame.pts, frame.image) for frame in frames)
        return
    if pts:
        numbers = _shown_at(index, pts)
    elif taken:
        numbers = frame_numbers(index, bounded(path, VideoSampling(**taken)), path)
    else:
        numbers = list(range(len(index)))
    yield from _numbered(path, _thinned(numbers, count))


def _index(path: Path) -> PacketIndex | None:
    """The packets of a video. Raises InputError for what is no file: a row may name anything."""
    if not path.is_file():
        raise InputError("no such file", where=path)
    with decoder_errors(path):
        return read_packets(path)


def _thinned(numbers: Sequence[int], count: int) -> list[int]:
    return sorted({int(numbers[i]) for i in spread(len(numbers), min(count, len(numbers)))})


def _shown_at(index: PacketIndex, pts: Sequence[float]) -> list[int]:
    """Numbers of the frames that are on display at these times."""
    times = index.pts_N[index.packet_F] * float(index.time_base)
    return np.clip(np.searchsorted(times, np.asarray(pts, dtype=float) + 1e-6, "right") - 1, 0, None).tolist()


def _numbered(path: Path, numbers: Sequence[int]) -> Iterator[tuple[float, np.ndarray]]:
    for frame in read_video(path, VideoSampling(allow_partial=True), frame_indices=numbers):
        yield frame.pts, frame.image


def _of_artifact(path: Path) -> tuple[Path, list[int]]:
    """The video of a frames artifact and the numbers of its frames. Raises InputError."""
    from safetensors import safe_open

    provenance = read_provenance(path) or {}
    facts = provenance.get("facts")
    video = find_source(Path(facts.get("source", "") if isinstance(facts, dict) else ""), path)
    with safe_open(path, "np") as f:
        return video, f.get_tensor("index").tolist()


def _read_haystack(path: Path, numbers: Sequence[int], fps: float) -> Iterator[tuple[int, float | None, Image.Image]]:
    """Number, time and image of a haystack's frames; one shorter than the test is repeated. Raises InputError."""
    if path.is_dir():
        images = list_images(path)
        for number in numbers if images else ():
            yield number, None, open_image(images[number % len(images)])
        return
    if path.suffix == ".safetensors":
        path, indices = _of_artifact(path)
    else:
        index = _index(path)
        if index is None:
            raise InputError("its frames cannot be numbered", where=path)
        indices = frame_numbers(index, VideoSampling(fps=fps), path)
    wanted: dict[int, list[int]] = {}
    for number in numbers:
        wanted.setdefault(indices[number % len(indices)], []).append(number)
    for frame in read_video(path, VideoSampling(allow_partial=True), frame_indices=sorted(wanted)):
        for number in wanted[frame.index]:
            yield number, frame.pts, Image.fromarray(frame.image)
