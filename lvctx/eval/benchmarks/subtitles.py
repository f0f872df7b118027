"""Subtitles in SubRip, WebVTT or one JSON object per word: unreadable cues are counted. No torch.

A cue is the text between two lines of times, as in FFmpeg's demuxer, so blank lines inside a cue and cues without blank
lines between them are read; a number on the line before the times belongs to the cue.
"""

import html
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lvctx.artifacts.bounded import parse_json, read_whole
from lvctx.errors import InputError

SUBTITLE_SUFFIXES = (".srt", ".vtt", ".jsonl")
_TIME = r"(-?)(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})(?:[,.:](\d{1,9}))?"
_SPAN = re.compile(rf"\s*{_TIME}\s*-{{1,2}}>\s*{_TIME}")
_TAG = re.compile(r"<[^<>\s][^<>]*>|\{\\[^{}]*\}")  # neither extends over a second bracket, so the time is linear


@dataclass(frozen=True, kw_only=True)
class Subtitles:
    """The cues of a file."""

    lines: tuple[tuple[float, float, str], ...]
    """First second, last second, text without markup; in temporal order."""
    bad: int
    """Number of cues without a readable time, that end before they begin, or with invalid bytes."""

    def at(self, times: Iterable[float]) -> str:
        """The lines on display at any of `times` (seconds), each once, in temporal order, as required by Video-MME."""
        moments = sorted(times)
        candidates = ((bisect_left(moments, start), end, text) for start, end, text in self.lines)
        return "\n".join(text for i, end, text in candidates if i < len(moments) and moments[i] < end)

    @property
    def text(self) -> str:
        """All of the text, without times."""
        return " ".join(text for _, _, text in self.lines)


NONE = Subtitles(lines=(), bad=0)
"""The subtitles of a video without speech."""


def find_subtitles(folder: Path, stem: str) -> Path | None:
    """A video's subtitle file in a folder: `STEM.srt`, `.vtt` or `.jsonl`, `STEM.en.srt`, or one of another language.

    Raises InputError if there are several languages, none of them English.
    """
    tag = r"\.[A-Za-z]{2,3}(?:[-_.][A-Za-z0-9]+)*"
    languages: dict[str, Path] = {}
    for file in sorted(folder.iterdir(), key=lambda file: (file.suffix.lower(), file.name)):
        language_tag = file.stem.removeprefix(stem).lower()
        if (
            file.suffix.lower() in SUBTITLE_SUFFIXES
            and file.stem.startswith(stem)
            and re.fullmatch(f"({tag})?", language_tag)
        ):
            languages.setdefault(language_tag, file)
    chosen = [languages[name] for name in sorted(languages) if not name or name.startswith(".en")]
    if not chosen and len(languages) > 1:
        names = ", ".join(sorted(file.name for file in languages.values()))
        raise InputError(f"subtitles of several languages for one video ({names})", where=folder, fix="keep one")
    return next(iter([*chosen, *languages.values()]), None)


MOST_SUBTITLES = 1 << 26
"""Bound of a file; a day of speech has about a million."""


def read_subtitles(path: Path) -> Subtitles:
    """Read a .srt, .vtt or .jsonl file; one that does not exist has no lines, as for videos without speech.

    Raises InputError for a file with text but no cue (another format), or that cannot be read.
    """
    if not path.exists():
        return NONE
    data = read_whole(path, most=MOST_SUBTITLES)
    text = data.decode(json.detect_encoding(data), errors="replace").replace("\0", "")
    if path.suffix.lower() == ".jsonl":
        return _read_words(text, path)
    rows = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    spans = [(i, match) for i, row in enumerate(rows) if (match := _SPAN.match(row))]
    if not spans:
        if text.strip() and not text.lstrip().startswith("WEBVTT"):
            raise InputError("the file has no subtitles", where=path, fix="give SubRip (.srt) or WebVTT (.vtt)")
        return NONE
    vtt = rows[0].startswith("WEBVTT")
    numbers = [_number_before(rows, i) for i, _ in spans]
    numbered = 2 * sum(number is not None for number in numbers) > len(numbers)
    lines, bad = [], 0 if vtt else _count_unread(rows[: spans[0][0]])
    for position, (i, match) in enumerate(spans):
        last = position + 1 == len(spans)
        cue_rows = rows[i + 1 : None if last else spans[position + 1][0]]
        if vtt:
            text_rows = _until_blank(cue_rows)
        else:
            text_rows, unread = _payload(cue_rows, numbers[position], numbered=numbered, last=last)
            bad += unread
        start, end = _seconds(match.groups()[:5]), _seconds(match.groups()[5:])
        words = _without_markup(" ".join(text_rows))
        bad += end <= start or "\ufffd" in words
        if words and end > start:
            lines.append((start, end, words))
    return Subtitles(lines=tuple(sorted(lines, key=lambda line: line[0])), bad=bad)


SENTENCE_GAP, LONG_GAP = 0.1, 0.5
"""Seconds without a word after which a line ends: after the end of a sentence, and after any word."""


def _read_words(text: str, path: Path) -> Subtitles:
    """Video-MME-v2's subtitles, `{"text", "start_time", "end_time"}` for each word, as lines of about a sentence."""
    lines: list[tuple[float, float, str]] = []
    bad = 0
    for row in filter(str.strip, text.split("\n")):
        try:
            word = parse_json(row, where=path)
            start, end, said = float(word["start_time"]), float(word["end_time"]), str(word["text"])
        except (ValueError, KeyError, TypeError):  # InputError is a ValueError
            bad += 1
            continue
        gap = start - lines[-1][1] if lines else 0.0
        ended = bool(lines) and lines[-1][2].rstrip().endswith((".", "!", "?"))
        if not lines or gap > LONG_GAP or (ended and gap > SENTENCE_GAP):
            lines.append((start, end, said))
        else:
            lines[-1] = (lines[-1][0], end, f"{lines[-1][2]} {said}")
    if bad and not lines:
        raise InputError(
            "the file has no subtitles",
            where=path,
            fix="write one JSON object per word, with text, start_time and end_time",
        )
    return Subtitles(lines=tuple(lines), bad=bad)


def _number(row: str) -> int | None:
    text = row.strip()
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _number_before(rows: Sequence[str], index: int) -> int | None:
    """The cue's number: the last line before its times that is not blank, if it is a number."""
    for row in reversed(rows[max(0, index - 3) : index]):
        if row.strip():
            return _number(row)
    return None


def _chunks(rows: Sequence[str]) -> list[list[str]]:
    """Rows between blank ones; a row of white space is blank."""
    chunks: list[list[str]] = [[]]
    for row in rows:
        if row.strip():
            chunks[-1].append(row)
        elif chunks[-1]:
            chunks.append([])
    return [chunk for chunk in chunks if chunk]


def _count_unread(rows: Sequence[str]) -> int:
    """Number of cues without a readable time before the first readable one."""
    return sum(len(chunk) > 1 for chunk in _chunks(rows))


def _until_blank(rows: Sequence[str]) -> list[str]:
    """WebVTT: a blank line ends the cue, and notes, styles and the next cue's name follow."""
    end = next((i for i, row in enumerate(rows) if not row.strip()), len(rows))
    return list(rows[:end])


def _payload(rows: Sequence[str], number: int | None, *, numbered: bool, last: bool) -> tuple[list[str], int]:
    """A cue's own rows among those up to the next times, and the number of cues in them without a readable time."""
    ends = [i for i, row in enumerate(rows) if row.strip()]
    if numbered and not last and ends and _number(rows[ends[-1]]) is not None:
        rows = rows[: ends[-1]]  # the number belongs to the next cue
    chunks = _chunks(rows)
    unread = [
        i
        for i, chunk in enumerate(chunks[1:], start=1)
        if numbered and number is not None and _number(chunk[0]) == number + 1 and (last or len(chunk) > 1)
    ]
    cue_chunks = chunks[: unread[0]] if unread else chunks
    unread_cues = sum(_number(chunk[0]) is not None for chunk in chunks[len(cue_chunks) :])
    return [row for chunk in cue_chunks for row in chunk], unread_cues


def _without_markup(text: str) -> str:
    text = _TAG.sub("", text)
    with suppress(ValueError):  # a character reference of thousands of digits
        text = html.unescape(text)
    return text.strip()


def _seconds(parts: Sequence[str | None]) -> float:
    sign, hours, minutes, seconds, fraction = (part or "" for part in parts)
    whole_seconds = int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds)
    return (-1 if sign else 1) * (whole_seconds + (int(fraction) / 10 ** len(fraction) if fraction else 0))
