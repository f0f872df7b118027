"""The kind of a path, from its first bytes and from the names of its files: for errors about an input of a wrong kind.

Nothing is loaded, and no content raises an error, so any path that a user gives can be checked.
"""

import json
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lvctx.artifacts import schemas
from lvctx.artifacts.bounded import parse_object, read_utf8
from lvctx.artifacts.store import MOST_HEADER
from lvctx.errors import InputError

Name = Literal[
    "missing",
    "empty",
    "directory",
    "model",
    "packed",
    "chat",
    "results",
    "haystack",
    "frames",
    "tensors",
    "video",
    "image",
    "sound",
    "playlist",
    "pointer",
    "page",
    "json",
    "text",
    "other",
]
HEAD = 4096
"""Number of bytes read."""


class Sniffed(NamedTuple):
    """A path's kind."""

    name: Name
    """For code."""
    phrase: str
    """Description for error messages, with its article."""


DIRECTORIES: dict[str, Sniffed] = {
    schemas.PACKED: Sniffed("packed", "packed text (of lvctx pack-text)"),
    schemas.CHAT: Sniffed("chat", "packed chat (of lvctx pack-chat)"),
    schemas.HAYSTACK: Sniffed("haystack", "a folder of haystack frames"),
}
MAGIC: tuple[tuple[int, bytes, Name, str], ...] = (
    (4, b"ftypavif", "image", "an image (AVIF)"),
    (4, b"ftypheic", "image", "an image (HEIC)"),
    (4, b"ftypmif1", "image", "an image (HEIF)"),
    (4, b"ftypM4A", "sound", "a sound file (M4A)"),
    (4, b"ftyp", "video", "a video (MP4 or QuickTime)"),
    (4, b"styp", "video", "a video (MP4 or QuickTime)"),
    (4, b"moov", "video", "a video (MP4 or QuickTime)"),
    (4, b"mdat", "video", "a video (MP4 or QuickTime)"),
    (4, b"wide", "video", "a video (MP4 or QuickTime)"),
    (0, b"\x1aE\xdf\xa3", "video", "a video (Matroska or WebM)"),
    (8, b"AVI ", "video", "a video (AVI)"),
    (8, b"WEBP", "image", "an image (WebP)"),
    (8, b"WAVE", "sound", "a sound file (WAV)"),
    (0, b"FLV\1", "video", "a video (FLV)"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "video", "a video (WMV)"),
    (0, b"\0\0\1\xba", "video", "a video (MPEG)"),
    (0, b"\0\0\1\xb3", "video", "a video (MPEG)"),
    (0, b"OggS", "video", "a video or sound file (Ogg)"),
    (0, b"GIF8", "image", "an image (GIF)"),
    (0, b"\x89PNG\r\n\x1a\n", "image", "an image (PNG)"),
    (0, b"\xff\xd8\xff", "image", "an image (JPEG)"),
    (0, b"BM", "image", "an image (BMP)"),
    (0, b"II*\0", "image", "an image (TIFF)"),
    (0, b"MM\0*", "image", "an image (TIFF)"),
    (0, b"ID3", "sound", "a sound file (MP3)"),
    (0, b"fLaC", "sound", "a sound file (FLAC)"),
    (0, b"PK\3\4", "other", "a ZIP archive"),
    (0, b"\x1f\x8b", "other", "a gzip file"),
    (0, b"\xfd7zXZ\0", "other", "an xz file"),
    (0, b"BZh", "other", "a bzip2 file"),
    (0, b"(\xb5/\xfd", "other", "a zstd file"),
    (0, b"7z\xbc\xaf'\x1c", "other", "a 7z archive"),
    (257, b"ustar", "other", "a tar archive"),
    (0, b"%PDF", "other", "a PDF"),
    (0, b"PAR1", "other", "a Parquet table"),
    (0, b"GGUF", "other", "GGUF weights"),
    (0, b"\x93NUMPY", "other", "a NumPy array"),
    (0, b"SQLite format 3", "other", "a SQLite database"),
)
"""Offset, bytes at the offset, kind and phrase; the first match is used."""


def sniff(path: Path) -> Sniffed:
    """The kind of a path."""
    if path.is_dir():
        return _sniff_directory(path)
    if not path.is_file():
        return Sniffed("missing", "nothing")
    try:
        with open(path, "rb") as f:
            head = f.read(HEAD)
    except OSError as e:
        return Sniffed("other", f"an unreadable file ({e.strerror})")
    if not head:
        return Sniffed("empty", "an empty file")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return _sniff_tensors(path)
    if text := _sniff_text(head):
        return text
    for at, magic, name, phrase in MAGIC:
        if head.startswith(magic, at):
            return Sniffed(name, phrase)
    if any(len(marks := head[offset::size]) > 3 and set(marks) == {0x47} for offset, size in ((0, 188), (4, 192))):
        return Sniffed("video", "a video (transport stream)")
    return Sniffed("other", "a file of unknown kind")


def _sniff_directory(path: Path) -> Sniffed:
    schema = _read_json(path / "MANIFEST.json").get("schema", "")
    if schema in DIRECTORIES:
        return DIRECTORIES[schema]
    if (path / "config.json").is_file():
        kind = _read_json(path / "config.json").get("model_type")
        return Sniffed("model", f"a model directory ({kind})" if kind else "a model directory")
    if (path / "results.jsonl").is_file():
        return Sniffed("results", "a results directory")
    return Sniffed("directory", "a directory")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_utf8(path), where=path)
    except InputError:
        return {}


def _sniff_tensors(path: Path) -> Sniffed:
    """A safetensors file, complete or not, by the command stored in its header."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = f.read(length) if length <= MOST_HEADER else b""
    try:
        made = json.loads(json.loads(header)["__metadata__"]["lvctx"])["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        made = ""
    if made in (schemas.FRAMES, schemas.FRAMES_HYBRID):
        return Sniffed("frames", "a frames artifact (of lvctx encode-video)")
    return Sniffed("tensors", "a safetensors file")


def _sniff_text(head: bytes) -> Sniffed | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = start[:512].lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return Sniffed("pointer", "a Git LFS pointer")
    if start.startswith((b"#EXTM3U", b"ffconcat version")) or b"<mpd" in lower:
        return Sniffed("playlist", "a playlist of other files")
    if lower.startswith((b"<!doctype html", b"<html", b"<head")) or b"<html" in lower:
        return Sniffed("page", "an HTML page")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Sniffed("text", "text (UTF-16)")
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as e:
        if e.start < HEAD - 4:  # else the last character is cut at the end of the head
            return None
    if b"\0" in head:
        return None
    return Sniffed("json", "JSON text") if start.startswith((b"{", b"[")) else Sniffed("text", "text")


ADVICE: dict[str, str] = {
    "pointer": "fetch the file itself: git lfs pull",
    "page": "the download went wrong: get the file again",
    "empty": "download or copy it again",
    "playlist": "give the files that it names, or join them with ffmpeg first",
}
"""What to do about a file of one of these kinds, which no command reads."""


def mistaken(path: Path, expected: str, *, fix: str = "", sniffed: Sniffed | None = None) -> InputError:
    """The error of a command that needs `expected` (a noun with its article) and got something else.

    `fix` is the advice for an intact file of another kind.
    """
    sniffed = sniffed or sniff(path)
    if sniffed.name == "missing":
        return InputError("no such file or directory", where=path)
    return InputError(f"{sniffed.phrase}, not {expected}", where=path, fix=ADVICE.get(sniffed.name, fix))


def check_kind(path: Path, name: Name, expected: str, *, fix: str) -> None:
    """Raise `mistaken` for a path of another kind; a directory of unknown kind passes."""
    sniffed = sniff(path)
    if sniffed.name not in (name, "directory"):
        raise mistaken(path, expected, fix=fix, sniffed=sniffed)


def encode_first(video: Path, model: str | None = None) -> str:
    """The command that makes a frames artifact of a video, as advice."""
    return f"run first: lvctx encode-video {shlex.quote(str(video))} --model {shlex.quote(model or 'VLM')} -o frames"
