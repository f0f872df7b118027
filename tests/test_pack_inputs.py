"""pack-text on files of another format than their name: read like Python's own readers, or refused.

The expectations are those of python's json, gzip, lzma and bz2, of the zstandard package and of the formats'
specifications (RFC 8259, RFC 1952, RFC 8878, Unicode's byte order marks).
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import warm_server
from support.refusals import refused
from test_documents import START, TEXTS, corpus, lines, read
from test_niah import run
from test_pack_text import make_tokenizer

from lvctx.data import decompress as unpack
from lvctx.data import json_values
from lvctx.data import tokenization as tokenize
from lvctx.data.document_fields import UNNAMED
from lvctx.data.documents import Place
from lvctx.data.packed import PackedRows
from lvctx.data.streams import find_parts
from lvctx.data.tokenization import OK, REPAIRED, SKIPPED
from lvctx.errors import InputError

SKIPPABLE = b"\x5a\x2a\x4d\x18\x04\0\0\0skip"
"""A skippable frame of RFC 8878, 3.1.2: magic 0x184D2A5A, size 4."""


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer")


def texts(path: Path, bpe: Path, **policy: Any) -> list[str]:
    return [text for text, _, _ in read(corpus(path), bpe, **policy)]


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json.{}", "a.JSONL.GZ"])
def test_compressed_content_is_known_by_its_first_bytes(kind: str, name: str, bpe: Path, tmp_path: Path) -> None:
    squeeze, path = COMPRESSED[kind], tmp_path / name.format(kind)
    half = len(lines(TEXTS[:150]))
    data = lines(TEXTS)
    members = squeeze(data[:half]) + squeeze(b"") + squeeze(data[half:])
    for content in (squeeze(data), members, members + bytes(512), squeeze(squeeze(data))):
        path.write_bytes(content)
        assert texts(path, bpe) == TEXTS
    for bad in (members[:-9], members[: len(members) // 2], members + b"garbage", squeeze(data)[:-1], members[:3]):
        path.write_bytes(bad)
        # Three bytes are not enough to know a compressed file: the first row is wrong then.
        with refused(InputError, path.name if kind == "gz" or len(bad) > 3 else f"{path.name}:1"):
            texts(path, bpe)
    damaged = bytearray(squeeze(data))
    damaged[len(damaged) // 2] ^= 0x55
    path.write_bytes(damaged)
    with pytest.raises(InputError):
        texts(path, bpe)
    path.write_bytes(squeeze(squeeze(squeeze(data))))
    with refused(InputError, path.name):
        texts(path, bpe)


def test_plain_files_with_a_compressed_name_and_texts_without_one(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(lines(TEXTS))
    assert texts(tmp_path / "a.jsonl.gz", bpe) == TEXTS
    (tmp_path / "a.txt.gz").write_text("plain")
    (tmp_path / "b.txt").write_bytes(lzma.compress(b"squeezed"))
    (tmp_path / "c.md.xz").write_bytes(lzma.compress(b"named"))
    (tmp_path / "d.txt.bz2").write_bytes(bz2.compress(b"so"))
    assert texts(tmp_path, bpe) == [*TEXTS, "plain", "squeezed", "named", "so"]


def test_zstandards_skippable_frames_may_be_anywhere(bpe: Path, tmp_path: Path) -> None:
    one, two = zstandard.compress(lines(["one"])), zstandard.compress(lines(["two"]))
    path = tmp_path / "a.jsonl.zst"
    for content in (SKIPPABLE + one + two, one + SKIPPABLE + two, one + two + SKIPPABLE, 3 * SKIPPABLE + one + two):
        path.write_bytes(content)
        assert texts(path, bpe) == ["one", "two"]
    path.write_bytes(one + SKIPPABLE[:-2])
    with refused(InputError, path.name):
        texts(path, bpe)


def tar(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def zipped(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", content)
    return packed.getvalue()


def parquet(values: list[str]) -> bytes:
    packed = io.BytesIO()
    pq.write_table(pa.table({"text": values}), packed)
    return packed.getvalue()


def lz4(content: bytes) -> bytes:
    return pa.compress(content, codec="lz4", asbytes=True)


def png() -> bytes:
    from PIL import Image

    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    return image.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "lz4": (lz4(b"one " * 9), "LZ4"),
    "zip": (zipped(b"one"), "a ZIP archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24), "a 7z archive"),
    "tar": (tar("a.txt", b"one"), "a tar archive"),
    "tar.gz": (gzip.compress(tar("a.txt", b"one")), "a tar archive"),
    "tar.xz": (lzma.compress(tar("a.txt", b"one")), "a tar archive"),
    "parquet": (parquet(["one"]), "Parquet, which is not supported; name it .parquet"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n", "PDF"),
    "png": (png(), "a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "a JPEG image"),
    "elf": (Path(sys.executable).resolve().read_bytes()[:4096], "an ELF program"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_neither_text_nor_json_is_refused_by_its_name(kind: str, bpe: Path, tmp_path: Path) -> None:
    content, said = FOREIGN[kind]
    for name in ("a.txt", "a.jsonl", f"a.jsonl.{kind}", "a"):
        path = tmp_path / name
        path.write_bytes(content)
        if path.suffix != ".parquet":
            with pytest.raises(InputError, match=rf"{name}: the content is {said}"):
                texts(path, bpe, skip_malformed=True)


def test_binary_content_without_a_name_is_no_text(bpe: Path, tmp_path: Path) -> None:
    """A NUL, or what is not UTF-8 and has control bytes that file(1) finds in no text."""
    path = tmp_path / "a.txt"
    noise = random.Random(0).randbytes(200)
    for content in (b"a\0b", noise, "sixteen".encode("utf-16-le"), b"caf\xe9 \x01", pa.compress(b"x" * 99, "brotli")):
        path.write_bytes(content)
        with refused(InputError, "a.txt"):
            texts(path, bpe)
    path.write_text("a\x01b\x1b[0m\x7f\fé", newline="")
    assert texts(path, bpe) == ["a\x01b\x1b[0m\x7f\fé"]
    path.write_bytes("café\r\n – naïve".encode("cp1252"))
    assert [status for _, _, status in read(corpus(path), bpe)] == [REPAIRED]
    (tmp_path / "a.jsonl").write_bytes(lines(["a\0b"]))
    assert texts(tmp_path / "a.jsonl", bpe) == ["a\0b"], "JSON can spell it"
    brotli = tmp_path / "a.jsonl.br"
    brotli.write_bytes(b"whatever")
    with refused(InputError, brotli.name):
        texts(brotli, bpe)


def test_a_folder_does_not_pass_by_what_it_cannot_decompress(tmp_path: Path) -> None:
    for name in ("a.jsonl.lz4", "b.txt.zip", "c.jsonl.br", "notes.pdf", "d.tar"):
        (tmp_path / name).write_bytes(b"x")
    assert [Path(part.name).name for part in find_parts([str(tmp_path)])] == ["a.jsonl.lz4", "b.txt.zip", "c.jsonl.br"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8"])
@pytest.mark.parametrize("squeeze", [bytes, gzip.compress, lzma.compress])
def test_a_byte_order_mark_names_the_encoding(encoding: str, squeeze: Any, bpe: Path, tmp_path: Path) -> None:
    story = "One é 漢字 𝄞 end.\u2028\r\nTwo." * 40_000  # more than a mebibyte
    documents = [story[:100], *TEXTS]
    plain = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in documents)
    array = json.dumps([{"text": t} for t in documents], ensure_ascii=False)
    for name, content, expected in (
        ("a.txt", story, [story]),
        ("a.jsonl", plain, documents),
        ("b.json", array, documents),
    ):
        (tmp_path / name).write_bytes(squeeze(("\ufeff" + content).encode(encoding)))
        assert texts(tmp_path / name, bpe) == expected


def test_damaged_utf16_is_reported_and_a_lone_surrogate_is_invalid_text(bpe: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffcut".encode("utf-16-le")[:-1])
    with refused(InputError, "a.txt"):
        texts(path, bpe)
    path.write_bytes("\ufeffa\ud800b".encode("utf-16-le", "surrogatepass"))
    assert [status for _, _, status in read(corpus(path), bpe)] == [REPAIRED]
    assert [status for _, _, status in read(corpus(path), bpe, invalid="skip")] == [SKIPPED]
    with refused(InputError, path.name):
        texts(path, bpe, invalid="error")


def layouts(documents: list[str]) -> dict[str, str]:
    """The same objects in every way that JSON allows between them."""
    objects = [{"text": t, "meta": {"n": [1, {}]}} for t in documents]
    one = [json.dumps(o, ensure_ascii=False) for o in objects]
    pretty = [json.dumps(o, ensure_ascii=False, indent=2) for o in objects]
    return {
        "lines": "\n".join(one),
        "blank lines": "\n\n \r\n" + "\n\n\t\n".join(one) + "\n\n",
        "CRLF": "\r\n".join(one) + "\r\n",
        "CR": "\r".join(one) + "\r",
        "end to end": "".join(one),
        "array": json.dumps(objects),
        "array with BOM": "\ufeff" + json.dumps(objects, ensure_ascii=False),
        "indented array": json.dumps(objects, indent="\t"),
        "an element a line": "[\n" + ",\n".join(one) + "\n]\n",
        "indented objects": "\n".join(pretty),
        "indented with CRLF": "\r\n".join(pretty).replace("\n", "\r\n").replace("\r\r", "\r"),
        "no space": json.dumps(objects, separators=(",", ":")),
    }


SPECIAL = [
    "one",
    "é 漢字 𝄞",
    "a\u2028b\u2029c\x85d\x1ce",
    'quo"te \\ [1, 2] {\n}',
    "",
    "  ",
    "x" * 3000,
    "]}",
    "\\u0041",
]


@pytest.mark.parametrize("layout", layouts([]))
def test_objects_are_read_however_they_are_laid_out(
    layout: str, bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_values, "MEBIBYTE", 100)  # values are cut anywhere
    documents = SPECIAL * 20
    path = tmp_path / "a.json"
    path.write_bytes(layouts(documents)[layout].encode())
    source = corpus(path)
    assert read(source, bpe) == [(t, UNNAMED, OK) for t in documents]
    chunks = list(source.chunks(START))
    for chunk in chunks[:: max(1, len(chunks) // 5)]:
        assert list(source.chunks(Place(*chunk.start))) == chunks[chunks.index(chunk) :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "a"}, {"text": "b"}', r"a\.json:1: malformed JSON \(the array has no end\)"),
        ('[{"text": "a"},\n {"text": "b', r"a\.json:2: malformed JSON \(Unterminated string"),
        ('[{"text": "a"},\n\n{"text": "b"} {"text": "c"}]', r"a\.json:3: malformed JSON \(Expecting ',' or '\]'\)"),
        ('[{"text": "a"},]', r"a\.json:1: malformed JSON \(Expecting value"),
        ('[{"text": "a"}]\n[{"text": "b"}]', r"a\.json:2: malformed JSON \(more after the array\)"),
        ('[{"text": "a"}, "b", 12]', r"a\.json\[1\]: not a JSON object"),
        ('[{"text": "a"}, {"body": "b"}]', r"a\.json\[1\]: no field 'text' \(it has body\)"),
        ('{\n"text": "a"\n}\n{\n"text": "b"', r"a\.json:5: malformed JSON \(Expecting ',' delimiter"),
        ('{"text": "torn\n{"text": "b"}', r"a\.json:1: malformed JSON \(Unterminated"),
        ('{"text": "a"} b\n{"text": "b"}', r"a\.json:1: malformed JSON \(Extra data"),
        ("[" * 100_000, r"a\.json:1: malformed JSON \(nested too deeply\)"),
        ('{"text": ' + "[" * 100_000, r"a\.json:1: malformed JSON"),
        ("[]", None),
    ],
)
def test_an_error_in_an_array_is_reported_with_its_location(
    content: str, said: str | None, bpe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    if said is None:
        assert texts(path, bpe) == []
        return
    with pytest.raises(InputError, match=said):
        texts(path, bpe)


def test_invalid_utf8_inside_an_array_is_the_policys(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "caf\xe9"}, {"text": "two"}]')
    assert read(corpus(tmp_path / "a.json"), bpe) == [("caf�", UNNAMED, REPAIRED), ("two", UNNAMED, OK)]
    with refused(InputError, "a.json[0]"):
        texts(tmp_path / "a.json", bpe, invalid="error")


def test_stdin_is_unpacked_like_a_file(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_documents import Stdin

    documents = [{"text": t} for t in TEXTS]
    for content in (json.dumps(documents), json.dumps(documents, indent=1), "\r".join(map(json.dumps, documents))):
        for squeeze in (bytes, lzma.compress, lambda data: SKIPPABLE + zstandard.compress(data)):
            monkeypatch.setattr("sys.stdin", Stdin(squeeze(content.encode())))
            assert [t for t, _, _ in read(corpus("-"), bpe)] == TEXTS
    monkeypatch.setattr("sys.stdin", Stdin("\ufeffsixteen".encode("utf-16-be")))
    assert [t for t, _, _ in read(corpus("-"), bpe)] == ["sixteen"]
    for content, said in ((png(), "stdin: the content is a PNG image"), (b"a\0", "stdin: not text")):
        monkeypatch.setattr("sys.stdin", Stdin(content))
        with pytest.raises(InputError, match=said):
            read(corpus("-"), bpe)


def test_a_pipe_that_gives_a_byte_at_a_time_is_known_too(bpe: Path, tmp_path: Path) -> None:
    command = [warm_server.start(), "pack-text", "-", "-o", tmp_path / "out", "--tokenizer", bpe]
    flags = ["--seq-len", "8", "--keep-short", "1", "--keep-tail", "--workers", "1"]
    child = subprocess.Popen([*command, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin
    for byte in gzip.compress(lines(["slow"])):
        child.stdin.write(bytes([byte]))
        child.stdin.flush()
    child.communicate()
    assert child.returncode == 0
    assert packed(tmp_path / "out", bpe) == ["slow"]


class InProcess:
    """Stands where the pool of processes stands: a property test has no time to start one for every file."""

    def __init__(self, workers: int, context: Any, *, initializer: Any, initargs: tuple[str, dict[str, Any]]) -> None:
        self.encoder = tokenize.Encoder(initargs[0], **initargs[1])

    def submit(self, function: Any, chunk: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(self.encoder.encode(chunk))
        except BaseException as e:
            done.set_exception(e)
        return done

    def shutdown(self, **how: Any) -> None:
        pass


def packed(out: Path, bpe: Path) -> list[str]:
    """The documents of a packed directory, in order: what stands between separators."""
    from tokenizers import Tokenizer

    tokenizer, rows = Tokenizer.from_file(str(bpe / "tokenizer.json")), PackedRows(out)
    ids = [int(i) for number in range(len(rows)) for i in rows.row(number)]
    separator = tokenizer.token_to_id("<|endoftext|>")
    cuts = [i for i, one in enumerate(ids) if one == separator]
    found = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
    return [text for text in found if text]


TEXT = st.one_of(st.text(st.characters(codec="utf-8"), max_size=40), st.sampled_from(SPECIAL))
RECORD = st.fixed_dictionaries(
    {"text": TEXT}, optional={"source": TEXT, "meta": st.sampled_from([None, 1, {"redpajama_set_name": "x"}, [[]]])}
)
WRONG = st.sampled_from(["", "nothing", 5, None, [], {}, {"text": 5}, {"text": None}, {"body": "x"}, [{"text": "x"}]])


@st.composite
def content(draw: Any) -> bytes:
    """A file of JSON, text or Parquet, maybe with wrong records, in some encoding, maybe compressed, maybe damaged."""
    records = draw(st.lists(RECORD, min_size=1, max_size=4))
    kind = draw(st.sampled_from(["lines", "array", "indented", "text", "parquet", "wrong"]))
    if kind == "parquet":
        data = parquet([record["text"] for record in records])
    else:
        some = [*records, draw(WRONG)] if kind == "wrong" else records
        how = {"ensure_ascii": draw(st.booleans())}
        joined = draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028"]))
        text = {
            "array": lambda: json.dumps(records, indent=draw(st.sampled_from([None, 1])), **how),
            "indented": lambda: joined.join(json.dumps(r, indent=1, **how) for r in records),
            "text": lambda: draw(TEXT) + joined + draw(TEXT),
        }.get(kind, lambda: joined.join(json.dumps(r, **how) for r in some))()
        data = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"])))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        data = draw(st.sampled_from(list(COMPRESSED.values())))(data)
    damage = draw(st.sampled_from(["", "", "", "cut", "flip", "insert", "tail"]))
    at = draw(st.integers(0, len(data)))
    some_bytes = draw(st.binary(min_size=1, max_size=6))
    if damage == "cut":
        data = data[:at]
    elif damage == "flip" and at < len(data):
        data = data[:at] + bytes([data[at] ^ some_bytes[0]]) + data[at + 1 :]
    elif damage == "insert":
        data = data[:at] + some_bytes + data[at:]
    elif damage == "tail":
        data += some_bytes
    return data


def independent(data: bytes, name: str) -> list[str] | None:
    """The documents as python's own readers find them; None where this reading has no opinion."""
    if name.endswith(".parquet"):
        return None if (table := _parquet(data)) is None else table
    readers: list[tuple[bytes, Callable[[bytes], bytes]]] = [
        (b"\x1f\x8b", gzip.decompress),
        (b"\x28\xb5\x2f\xfd", lambda d: zstandard.ZstdDecompressor().stream_reader(d, read_across_frames=True).read()),
        (b"\xfd7zXZ", lzma.decompress),
        (b"BZh", bz2.decompress),
    ]
    try:
        for _ in range(2):
            for magic, reader in readers:
                if data.startswith(magic):
                    data = reader(data)
                    break
        encoding = next((e for m, e in unpack._MARKS if data.startswith(m)), "utf-8-sig")
        text = data.decode(encoding)
    except Exception:
        return None
    if not name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return [text]
    try:
        try:
            whole = json.loads(text)
            records = whole if isinstance(whole, list) else [whole]
        except ValueError:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [record["text"] for record in records]
    except Exception:
        return None


def _parquet(data: bytes) -> list[str] | None:
    try:
        return [value.as_py() for value in pq.read_table(io.BytesIO(data)).column("text")]
    except Exception:
        return None


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "ProcessPoolExecutor", InProcess)


@settings(max_examples=100, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(data=content(), name=st.sampled_from(["a.jsonl", "a.json", "a.txt", "a", "a.jsonl.gz", "a.zst", "a.parquet"]))
def test_whatever_the_file_is_it_is_read_whole_or_refused(
    inline: None, data: bytes, name: str, bpe: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("x")
    (folder / name).write_bytes(data)
    out = folder / "out"
    flags = ["--tokenizer", bpe, "--seq-len", 2, "--keep-short", 1, "--keep-tail", "--mix", "none", "-q"]
    done = run("pack-text", folder / name, "-o", out, *flags)
    assert done.exit_code in (0, 2, 3, 4, 5), done.output
    if done.exit_code:
        assert done.stderr.startswith("lvctx: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        return
    expected = independent(data, name)
    if expected is not None:
        assert packed(out, bpe) == [text for text in expected if text]


def test_names_that_are_not_utf8_and_names_too_long(bpe: Path, tmp_path: Path, inline: None) -> None:
    folder = os.fsencode(tmp_path) + b"/d\xff"
    os.mkdir(folder)
    for name, data in (
        (b"a\xfe.jsonl", lines(["one"])),
        (b"b\xfe.txt", b"two"),
        (b"c\xfe.parquet", parquet(["three"])),
    ):
        (Path(os.fsdecode(folder)) / os.fsdecode(name)).write_bytes(data)
    flags = ["--tokenizer", bpe, "--seq-len", 2, "--keep-short", 1, "--keep-tail"]
    done = run("pack-text", os.fsdecode(folder), "-o", tmp_path / "out", *flags)
    assert done.exit_code == 0, done.output
    assert packed(tmp_path / "out", bpe) == ["one", "two", "three"]
    for missing in (os.fsdecode(b"/gone\xff.jsonl"), "x" * 300 + ".jsonl"):
        assert run("pack-text", missing, "-o", tmp_path / "no", *flags).exit_code == 3
    os.mkfifo(tmp_path / "pipe.jsonl")
    done = run("pack-text", tmp_path / "pipe.jsonl", "-o", tmp_path / "no", *flags)
    assert (done.exit_code, "pipe it to -" in done.stderr) == (3, True)
