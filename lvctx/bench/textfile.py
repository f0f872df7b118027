"""Text files of other people: their encoding, and the JSON values in them. No torch.

Lines are never cut by `str.splitlines`: it also cuts at U+2028, U+0085 and form feeds, which may stand inside a string.
"""

import json
import re
from pathlib import Path
from typing import Any

from lvctx.errors import InputError


def encoding_of(data: bytes) -> str:
    """UTF-8, UTF-16 or UTF-32, by the byte order mark or by where the zero bytes of the first characters are."""
    return json.detect_encoding(data)


def read_text(path: Path) -> str:
    """A file's text without its byte order mark.

    Raises InputError for a file that does not exist, cannot be read, or is in no encoding of Unicode.
    """
    try:
        data = path.read_bytes()
        return data.decode(encoding_of(data))
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except UnicodeDecodeError as e:
        raise InputError(f"byte {e.start:,} is not {e.encoding}", where=path, fix="save the file as UTF-8") from e
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=path) from e


_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own white space, RFC 8259


def json_values(text: str) -> list[Any]:
    """The JSON values that a text holds one after the other: one of a .json file, one for each line of a .jsonl file.

    Raises ValueError for malformed JSON, values nested too deep to be read, and strings that are no Unicode text.
    """
    decoder, found = json.JSONDecoder(), []
    at = _SPACE.match(text).end()  # type: ignore[union-attr]  # the pattern matches everywhere
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found.append(value)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    except RecursionError:
        raise ValueError("nested too deep") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):
        check_unicode(found)
    return found


def check_unicode(value: Any) -> None:
    """Raise ValueError where a string holds half of a surrogate pair, which no file or terminal takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in a string") from None
