"""Files from a user, read whole: at most so many bytes, and as text, JSON or TOML that a program may be given.

A path may be a device without end or a pipe that nobody writes to; JSON may be nested 100,000 levels, which Python's
parser reports as a RecursionError, or have a number of 5,000 digits. All of these are an InputError.
"""

import json
import stat
import tomllib
from pathlib import Path
from typing import Any

from lvctx.errors import InputError, first_line

MOST_BYTES = 1 << 28
"""Bound of a JSON file that is read whole; the largest tokenizer.json has 35 MB."""
MOST_TOML = 1 << 20
"""Bound of a recipe."""
MOST_DOTS = 1_000
"""Bound of the dots in a line of TOML: tomllib takes time and memory quadratic in the parts of a dotted key."""


def check_is_file(path: Path) -> None:
    """Raise InputError for a missing file, a directory, and a pipe or device, which may have no end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise InputError(f"cannot read ({getattr(e, 'strerror', None) or e})", where=path) from e
    if stat.S_ISDIR(mode):
        raise InputError("a directory, not a file", where=path)
    if not stat.S_ISREG(mode):
        raise InputError("a pipe or device, not a file", where=path, fix="write its content to a file")


def read_whole(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """A file's bytes. Raises InputError for what is no readable file, or has more than `most` bytes."""
    check_is_file(path)
    try:
        with open(path, "rb") as f:
            content = f.read(most + 1)
    except OSError as e:
        raise InputError(f"cannot read ({e.strerror})", where=path) from e
    if len(content) > most:
        raise InputError(f"larger than {most:,} bytes", where=path)
    return content


def read_utf8(path: Path, *, most: int = MOST_BYTES) -> str:
    """A file's text. Raises InputError for what `read_whole` refuses, and text in another encoding."""
    try:
        return read_whole(path, most=most).decode()
    except UnicodeDecodeError as e:
        raise InputError(f"byte {e.start:,} is not UTF-8", where=path, fix="save the file as UTF-8") from e


def parse_json(text: str | bytes, *, where: object, fix: str = "") -> Any:
    """The value of JSON. Raises InputError for malformed JSON, and for JSON that Python cannot hold."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise InputError("malformed JSON (nested too deeply)", where=where, fix=fix) from e
    except ValueError as e:
        raise InputError(f"malformed JSON ({first_line(e)})", where=where, fix=fix) from e


def parse_object(text: str | bytes, *, where: object) -> dict[str, Any]:
    """The same for JSON that has to be an object."""
    value = parse_json(text, where=where)
    if not isinstance(value, dict):
        raise InputError(f"holds a JSON {type(value).__name__}, not an object", where=where)
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError for what `read_utf8` refuses, and for malformed TOML."""
    text = read_utf8(path, most=MOST_TOML)
    if max((line.count(".") for line in text.split("\n")), default=0) > MOST_DOTS:
        raise InputError(f"not valid TOML (a line with more than {MOST_DOTS:,} dots)", where=path)
    try:
        return tomllib.loads(text)
    except RecursionError as e:
        raise InputError("not valid TOML (nested too deeply)", where=path) from e
    except ValueError as e:
        raise InputError(f"not valid TOML ({first_line(e)})", where=path) from e
