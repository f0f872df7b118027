"""Division of independent work among processes."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

WorkT = TypeVar("WorkT", bound=Hashable)


def divide_work(sizes: Mapping[WorkT, int], groups: int) -> list[list[WorkT]]:
    """The keys that each group gets, so that loads are nearly equal: largest first, each to the least load."""
    shares: list[list[WorkT]] = [[] for _ in range(groups)]
    loads = [0] * groups
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(key)
        loads[least] += sizes[key] + 1
    return shares


def share_videos(videos: Sequence[tuple[Path, dict[str, Any]]], processes: int) -> list[list[int]]:
    """Indices of the videos that each process encodes, in order, by the sizes of their files.

    Videos with the same file name go to one process, which decides which of them gets the plain name.
    """
    members_of: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    for i, (video, _) in enumerate(videos):
        members_of[video.stem].append(i)
        sizes[video.stem] += video.stat().st_size if video.is_file() else 0
    return [sorted(i for stem in share for i in members_of[stem]) for share in divide_work(sizes, processes)]
