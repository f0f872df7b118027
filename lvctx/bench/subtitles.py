"""SubRip subtitles as they are found: what can be read is kept, what cannot is counted. No torch."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TIME = r"(\d{1,3}):(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_SPAN = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}")


@dataclass(frozen=True, kw_only=True)
class Subtitles:
    """A file's lines."""

    lines: tuple[tuple[float, float, str], ...]
    """First second, last second, text without markup."""
    bad: int
    """Blocks without a readable time, that end before they begin, or with bytes that are not UTF-8."""

    def at(self, times: Iterable[float]) -> str:
        """The lines on display at any of `times` (seconds), each once, in the order of the file, as Video-MME asks."""
        moments = list(times)
        return "\n".join(text for start, end, text in self.lines if any(start <= t < end for t in moments))


def read_subtitles(path: Path) -> Subtitles:
    """Read a .srt file; one that does not exist has no lines, as for videos in which nobody speaks."""
    if not path.is_file():
        return Subtitles(lines=(), bad=0)
    text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    lines, bad = [], 0
    for block in re.split(r"\n\s*\n", text):
        if not block.strip():
            continue
        rows = block.strip("\n").split("\n")
        place = next((i for i, row in enumerate(rows[:2]) if _SPAN.match(row)), None)
        if place is None:
            bad += 1
            continue
        found = _SPAN.match(rows[place])
        assert found
        h, m, s, ms, h2, m2, s2, ms2 = found.groups()
        start, end = _seconds(h, m, s, ms), _seconds(h2, m2, s2, ms2)
        said = html.unescape(re.sub(r"<[^>]*>|\{\\[^}]*\}", "", " ".join(rows[place + 1 :]))).strip()
        bad += end <= start or "\ufffd" in said
        if said and end > start:
            lines.append((start, end, said))
    return Subtitles(lines=tuple(lines), bad=bad)


def _seconds(hours: str, minutes: str, seconds: str, fraction: str) -> float:
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction) / 10 ** len(fraction)
