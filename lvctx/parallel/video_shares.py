"""Which videos each process encodes."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def share_videos(videos: Sequence[tuple[Path, dict[str, Any]]], processes: int) -> list[list[int]]:
    """Indices of the videos that each process encodes, in order; largest files first, each to the least load.

    Videos with the same file name go to one process, which decides which of them gets the plain name.
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
