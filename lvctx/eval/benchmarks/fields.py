"""Parsers for cells of question files: text, lists of options, keys of the right option. No torch."""

import ast
import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

MOST_OPTIONS = 26
"""The number of letters."""


def cell_text(value: Any) -> str | None:
    """The text of a cell; a whole float as its integer (`3.0` is "3"). None for no value, NaN, lists and mappings."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if value is None or isinstance(value, list | tuple | dict | set):
        return None
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    return str(value)


def check_unicode(value: Any) -> None:
    """Raise ValueError if a string has half of a surrogate pair, which cannot be encoded."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a string") from None


_KEY = re.compile(r"([A-Za-z])|[(\[]\s*([A-Za-z])\s*[)\]][.:]?(?:\s.*)?|([A-Za-z])[.):](?:\s.*)?", re.DOTALL)
_INDEX = re.compile(r"\+?(\d{1,9})(?:\.0*)?")


def parse_key(value: Any, count: int, *, indexed: bool = False) -> str | None:
    """The letter of the right option, written `B`, `b`, `(B)`, `B.`, `B. text`; None for anything else.

    Args:
        value: The cell.
        count: Number of options; a letter or index beyond them is None.
        indexed: The format counts options from 0, so 1, `"1"` and `"1.0"` are also B.
    """
    text = "" if isinstance(value, bool) else (cell_text(value) or "").strip()
    if indexed and (number := _INDEX.fullmatch(text)):
        index = int(number[1])
    elif lettered := _KEY.fullmatch(text):
        index = ord((lettered[1] or lettered[2] or lettered[3]).upper()) - 65
    else:
        return None
    return chr(65 + index) if index < count else None


def have_letters(options: Sequence[str]) -> bool:
    """Whether options begin with their letters: `A. first`, `(B) second`, ..."""
    return all(re.match(rf"\(?{chr(65 + i)}[.):]", option) for i, option in enumerate(options[:MOST_OPTIONS]))


def parse_list(value: Any) -> list[str]:
    """The items of a cell that is a list or the text of one.

    Accepts lists; mappings from letters; and as text, lists of JSON, Python and numpy (without commas), one item per
    line, and items that begin with their letters. Raises ValueError with the reason.
    """
    if isinstance(value, list | tuple):
        items = [cell_text(item) for item in value]
        if None in items:
            raise ValueError("one item has no text")
        return [item for item in items if item is not None]
    if isinstance(value, dict):
        options = {key: item for key, item in value.items() if cell_text(item) is not None}
        if list(options) != [chr(65 + i) for i in range(len(options))]:
            raise ValueError("a mapping whose keys are not A, B, C, ...")
        return parse_list(list(options.values()))
    parsed = _items((cell_text(value) or "").strip())
    check_unicode(parsed)
    return parsed


def _items(text: str) -> list[str]:
    if not text:
        raise ValueError("none")
    if wrapped := re.fullmatch(r"array\((\[.*\])(?:,\s*dtype=[^()]*)?\)", text, re.DOTALL):
        text = wrapped[1]
    if re.match(r"\[\s*(?:u?['\"]|[\d-])|\(\s*u?['\"]|[{]", text) and text[-1] in "])}":
        parsed = _literal(text)
        return _quoted(text[1:-1]) if parsed is None else parse_list(parsed)
    if text[0] == "[" and text[-1] == "]":
        text = text[1:-1]
    return _lines(text)


_ITEM = re.compile(r"""[\s,]*(?:u?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(-?\d+(?:\.\d+)?)(?=[\s,]|$))""", re.DOTALL)


def _literal(text: str) -> list[Any] | dict[str, Any] | None:
    """A JSON list, or a mapping of JSON or Python. None for other text.

    Python's own parser is not used for lists, since it joins numpy's items, which have no commas.
    """
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        if text[0] != "{":
            return None
        try:
            parsed = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError("text in braces that is not a mapping") from None
    return parsed if isinstance(parsed, list | dict) else None


def _quoted(text: str) -> list[str]:
    """Items in quotes, and numbers, separated by commas or white space."""
    items, position, end = [], 0, len(text.rstrip(", \t\r\n"))
    while position < end:
        match = _ITEM.match(text, position)
        if not match:
            raise ValueError("text in brackets that is not a list of quoted items")
        try:
            with warnings.catch_warnings(action="ignore"):  # about invalid escapes
                items.append(str(ast.literal_eval(match[1])) if match[1] else match[2])
        except (ValueError, SyntaxError):  # a line break or an invalid escape in the quotes: kept unchanged
            items.append(match[1][1:-1])
        position = match.end()
    return items


def _lines(text: str) -> list[str]:
    """Items that begin with letters, each on its own line or lines, or all on one line; else one item per line."""
    for prefix, separators in ((r"(?:^|\n)[ \t]*", ""), (r"(?:^|(?<=[\s,;|]))", ",;|")):
        starts = list(re.finditer(rf"{prefix}\(?([A-Z])[.):](?=\s)", text))
        in_order = [start[1] for start in starts] == [chr(65 + i) for i in range(len(starts))]
        if len(starts) > 1 and in_order and starts[0].start() == 0:
            ends = [*(start.start() for start in starts[1:]), len(text)]
            items = (text[start.start() : end].strip() for start, end in zip(starts, ends, strict=True))
            return [item.rstrip(separators).rstrip() for item in items]
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if len(lines) < 2:
        raise ValueError("text that is neither a list nor lines")
    return lines
