"""`--frames-from`: the frames of each video that somebody else's selector chose, by number or by time.

The file has one JSON object per line, or a JSON list of them: `{"video": NAME, "frames": [0, 250]}` with numbers in the
order of presentation from 0, or `{"video": NAME, "times": [0, 10.5]}` with seconds from the first frame, each for the
frame on display. No heavy module is imported here, since the commands' help is made from `sampling.py`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from os.path import basename, splitext
from pathlib import Path
from typing import Any, Literal, Self

from lvctx.artifacts.bounded import parse_json, read_whole
from lvctx.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ChosenFrames:
    """The frames of one video."""

    video: str
    """Its name in the file."""
    unit: Literal["frames", "times"]
    """Whether they are numbers of frames or seconds."""
    values: tuple[float, ...]
    """In ascending order, each once."""


@dataclass(frozen=True, kw_only=True)
class FrameList:
    """A file of chosen frames."""

    file: str
    """Its path, for messages."""
    digest: str
    """Sixteen hex digits that identify its content."""
    chosen: tuple[ChosenFrames, ...]
    """One entry for each video."""

    @classmethod
    def read(cls, path: str) -> Self:
        """Read a file. Raises InputError naming the entry and its problem."""
        data = read_whole(Path(path))
        chosen: dict[str, ChosenFrames] = {}
        for number, value in enumerate(_entries(data, path), start=1):
            entry = _entry(value, f"{path}, entry {number}")
            if basename(entry.video) in chosen:
                raise InputError(f"two entries for {entry.video:.80}", where=path, fix="keep one")
            chosen[basename(entry.video)] = entry
        if not chosen:
            raise InputError("no entry", where=path)
        return cls(file=path, digest=hashlib.sha256(data).hexdigest()[:16], chosen=tuple(chosen.values()))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        entries = (ChosenFrames(**{**entry, "values": tuple(entry["values"])}) for entry in raw["chosen"])
        return cls(file=raw["file"], digest=raw["digest"], chosen=tuple(entries))

    @cached_property
    def _by_name(self) -> dict[str, ChosenFrames]:
        """By file name and, where no other entry has that name, by file name without suffix."""
        by_stem = {splitext(basename(entry.video))[0]: entry for entry in self.chosen}
        return by_stem | {basename(entry.video): entry for entry in self.chosen}

    def of(self, video: Path) -> ChosenFrames:
        """The entry of a video by its file name, else by its name without suffix. Raises InputError without one."""
        entry = self._by_name.get(video.name) or self._by_name.get(video.stem)
        if entry is None:
            raise InputError(f"no frames were chosen in {self.file}", where=video, fix="add an entry for this video")
        return entry


def _entries(data: bytes, path: str) -> list[Any]:
    """The values of a JSON list, or of lines. Raises InputError naming the line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"byte {e.start:,} is not UTF-8", where=path, fix="save the file as UTF-8") from e
    if text.lstrip().startswith("["):
        values = parse_json(text, where=path)
        return values if isinstance(values, list) else [values]
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, where=f"{path}:{number}") for number, line in lines if line.strip()]


def _entry(value: Any, where: str) -> ChosenFrames:
    fix = 'write {"video": NAME, "frames": [0, 250]} or "times" in seconds'
    units = [unit for unit in ("frames", "times") if isinstance(value, dict) and unit in value]
    if len(units) != 1 or not isinstance(value.get("video"), str) or not basename(value["video"]):
        raise InputError("not a video with either frames or times", where=where, fix=fix)
    unit: Literal["frames", "times"] = "frames" if units == ["frames"] else "times"
    values = value[unit]
    kind = int if unit == "frames" else int | float
    numbers = isinstance(values, list) and all(isinstance(n, kind) and not isinstance(n, bool) for n in values)
    if not numbers or not values or not all(0 <= n < 1e9 and isfinite(n) for n in values):
        raise InputError(f"{unit} of {value['video']:.80} is not a list of numbers from 0", where=where, fix=fix)
    return ChosenFrames(video=value["video"], unit=unit, values=tuple(sorted(set(values))))
