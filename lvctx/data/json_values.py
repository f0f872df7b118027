"""Converts JSON that is not one object per line to JSON lines while it is read: an array, objects over several lines as
`jq` and `json.dumps(indent=...)` write them, objects without a line end between them, or with only CR.

Memory holds at most one value and a mebibyte. Values are not reformatted, so errors inside a value (invalid UTF-8, a
missing field) are reported where all records are checked.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from lvctx.data.decompress import MEBIBYTE, Pieces
from lvctx.errors import InputError

_SPACE = re.compile(r"[ \t\r\n]*")
_scan = json.JSONDecoder(parse_int=str).raw_decode  # the size of a number is not checked here
MOST_VALUE = 1 << 28
"""Bound of a JSON value, or a line, in bytes or characters."""
_NEAR = 16
"""Within this many characters of the end of the buffer, an error may be due to the cut: an escape has up to 12."""


def as_lines(stream: io.BufferedReader, name: str) -> io.BufferedReader | None:
    """JSON lines of the values in `stream`, or None if it begins like JSON lines already.

    Reading raises InputError that names the line where the JSON is malformed or ends too early.
    """
    head = stream.peek(MEBIBYTE)[:MEBIBYTE].decode(errors="replace").lstrip("\ufeff \t\r\n")
    if not (head.startswith("[") or _is_spread(head)):
        return None
    return io.BufferedReader(Pieces(_lines(_Text(stream, name)), stream), MEBIBYTE)


def lines_of(stream: io.BufferedReader, name: str) -> Iterator[bytes]:
    """The lines of a stream. Raises InputError for one that is longer than `MOST_VALUE`."""
    while line := stream.readline(MOST_VALUE + 1):
        if len(line) > MOST_VALUE:
            raise InputError(f"a line of more than {MOST_VALUE:,} bytes", where=name, fix="split it")
        yield line


def _is_spread(text: str) -> bool:
    """Whether the first object continues on the next line, or another one follows it on the same line."""
    line, _, rest = text.partition("\n")
    if not line.startswith("{"):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":
            return line.startswith("{", e.pos)
        return e.pos >= len(line.rstrip()) and rest.lstrip().startswith(('"', "}"))
    except (ValueError, RecursionError):
        pass
    return False


def _lines(text: "_Text") -> Iterator[bytes]:
    if text.next() != "[":
        while text.next():
            yield text.value()
        return
    text.skip()
    mark = "]" if text.next() == "]" else ""
    if mark:
        text.skip()
    while mark != "]":
        yield text.value()
        mark = text.next()
        if mark not in (",", "]") or not mark:
            raise text.malformed("Expecting ',' or ']'" if mark else "the array has no end")
        text.skip()
    if text.next():
        raise text.malformed("more after the array")


class _Text:
    """The text of a stream from the current position on, read as needed."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._at, self._line, self._ended = "", 0, 1, False
        self._grow()
        self._text = self._text.removeprefix("\ufeff")

    def _grow(self) -> bool:
        """Double the buffered text, so that a long value is not scanned often; False at the end."""
        if self._ended:
            return False
        if len(self._text) - self._at > MOST_VALUE:
            raise self.malformed(f"a value of more than {MOST_VALUE:,} characters")
        block = self._stream.read(max(MEBIBYTE, len(self._text) - self._at))
        self._ended = not block
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + self._decode(block, self._ended), 0
        return True

    def next(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Skip the character that `next` returned."""
        self._at += 1

    def value(self) -> bytes:
        """The value that begins at the next character, as a line."""
        self.next()
        while True:
            try:
                _, end = _scan(self._text, self._at)
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated string") or e.pos > len(self._text) - _NEAR
                if cut and self._grow():
                    continue
                raise self.malformed(e.msg, e.pos) from e
            except RecursionError as e:
                raise self.malformed("nested too deeply") from e
            if end < len(self._text) or self._text[end - 1] in '}]"' or not self._grow():
                break  # a number may continue in text that is not read yet
        value, self._at = self._text[self._at : end], end
        return value.replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogateescape") + b"\n"

    def malformed(self, what: str, at: int | None = None) -> InputError:
        """The error that names the line, at the current or a given position."""
        line = self._line + self._text.count("\n", 0, self._at if at is None else at)
        return InputError(f"malformed JSON ({what})", where=f"{self._name}:{line}", fix="correct it")
