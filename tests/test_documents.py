"""Every kind of input gives the same documents from any place on; an error names its location in one line."""

import bz2
import gzip
import io
import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import zstandard
from support import warm_server
from support.refusals import refused
from test_pack_text import make_documents, make_tokenizer, write_lines

from lvctx.data import documents
from lvctx.data.document_fields import UNNAMED, Fields
from lvctx.data.documents import Chunk, Corpus, Place
from lvctx.data.row_groups import RowGroupReader, spans_of
from lvctx.data.streams import find_parts
from lvctx.data.tokenization import MALFORMED, OK, REPAIRED, SKIPPED, UNREADABLE, Encoder, Policy
from lvctx.errors import InputError

TEXTS = [f"document {i}: " + "é漢字 word " * (i % 7) for i in range(300)]
START = Place(0, 0, 0)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MEBIBYTE", 1 << 10)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer")


def corpus(*inputs: Path | str, **fields: Any) -> Corpus:
    return Corpus([str(i) for i in inputs], fields=Fields(**fields))


class Plain:
    """Stands where the tokenizer stands and keeps the text."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        for text in texts:
            text.encode()  # as the library does
        self.texts = texts
        return [type("Encoding", (), {"ids": [1] * len(t), "__len__": lambda self: len(self.ids)})() for t in texts]


def read(source: Corpus, bpe: Path, *, start: Place = START, **policy: Any) -> list[tuple[str, str, int]]:
    """(text, source, status) of every document."""
    content = (bpe / "tokenizer.json").read_text()
    encoder = Encoder(content, separator=0, fields=source.fields, policy=Policy(**policy))
    plain = encoder.tokenizer = Plain()  # type: ignore[assignment]
    found = []
    for chunk in source.chunks(start):
        tokens = encoder.encode(chunk)
        names = [tokens.names[c] for c in tokens.codes]
        found += list(zip(plain.texts, names, tokens.status.tolist(), strict=True))
    return found


def lines(texts: list[str], **more: Any) -> bytes:
    return "".join(json.dumps({"text": t, **more}) + "\n" for t in texts).encode()


def squeeze(data: bytes, frames: int) -> bytes:
    cut = len(data) // frames
    pieces = [data[i * cut : (i + 1) * cut if i < frames - 1 else None] for i in range(frames)]
    return b"".join(zstandard.compress(piece) for piece in pieces)


def write_parquet(path: Path, texts: list[str], **columns: list[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=40)
    return path


def make_input(kind: str, folder: Path) -> Path:
    if kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines(TEXTS))
    elif kind == "gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:100])) + gzip.compress(lines(TEXTS[100:])))
    elif kind == "zst":
        (folder / "a.jsonl.zst").write_bytes(squeeze(lines(TEXTS), 3))
    elif kind == "parquet":
        write_parquet(folder / "a.parquet", TEXTS)
    elif kind == "text":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:04d}.txt").write_bytes(text.encode())
        (folder / "notes.pdf").write_bytes(b"not read")
        (folder / ".hidden.txt").write_bytes(b"not read")
    elif kind == "saved":
        import datasets

        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(folder / "set"))
        return folder / "set"
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet", "text", "saved"])
def test_every_kind_gives_the_same_documents_from_any_place_on(kind: str, bpe: Path, tmp_path: Path) -> None:
    source = corpus(make_input(kind, tmp_path))
    assert read(source, bpe) == [(t, UNNAMED, OK) for t in TEXTS]
    chunks = list(source.chunks(START))
    assert len(chunks) > 5
    for before, chunk in itertools.pairwise(chunks):
        assert before.end == chunk.start or kind == "text"
    for chunk in chunks[::4]:
        rest = list(source.chunks(Place(*json.loads(json.dumps(chunk.start)))))
        assert rest == chunks[chunks.index(chunk) :]
        begin = chunk.start.part if kind == "text" else chunk.start.line
        assert [text for text, _, _ in read(source, bpe, start=chunk.start)] == TEXTS[begin:]


def test_processes_that_share_a_row_group_read_each_row_once(tmp_path: Path) -> None:
    path, fields = write_parquet(tmp_path / "a.parquet", TEXTS), Fields()
    spans = list(spans_of(str(path), fields, start=0, most_bytes=1 << 10, most_rows=9))
    assert len(spans) > len(TEXTS) // 9
    readers = [RowGroupReader(fields) for _ in range(3)]
    rows = [readers[i * i % 3].read(str(path), span) for i, span in enumerate(spans)]
    assert [row["text"].decode() for some in rows for row in some] == TEXTS
    assert readers[0].read(str(path), spans[1]) == rows[1], "also one that it has passed"


def test_what_is_wrong_in_parquet_is_named_by_the_process_that_reads_it(bpe: Path, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "numbers.parquet", [None, None, 5])  # type: ignore[list-item]
    with pytest.raises(InputError) as caught:
        read(corpus(path), bpe, skip_malformed=True)
    assert caught.value.where == f"{path}:3"
    path = write_parquet(tmp_path / "damaged.parquet", TEXTS)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)  # the header of the first page
    path.write_bytes(data)
    chunks = list(corpus(path).chunks(START))
    assert chunks[-1].end.line == len(TEXTS), "the packing process reads no page"
    with pytest.raises(InputError) as caught:
        read(corpus(path), bpe)
    assert caught.value.where == str(path)


def test_several_inputs_follow_each_other(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(["second"]) + b"\n  \r\n" + lines(["third"]).rstrip())
    write_parquet(tmp_path / "c.parquet", ["fourth"])
    (tmp_path / "d").write_text("fifth, a file without an extension")
    order = ["d", "c.parquet", "b.jsonl", "a.txt"]
    texts = [t for t, _, _ in read(corpus(*(tmp_path / n for n in order)), bpe)]
    assert texts == ["fifth, a file without an extension", "fourth", "second", "third", "first"]


def test_sources_are_found_where_they_are_named(bpe: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "a", "source": "web"},
        {"text": "b", "meta": {"redpajama_set_name": "RedPajamaBook"}},
        {"text": "c", "meta": {"other": 1}},
        {"text": "d", "source": None},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [s for _, s, _ in read(corpus(tmp_path / "a.jsonl"), bpe)] == ["web", "RedPajamaBook", UNNAMED, UNNAMED]
    (tmp_path / "b.jsonl").write_text(json.dumps({"doc": {"body": "x"}, "from": {"site": 7}}))
    found = read(corpus(tmp_path / "b.jsonl", text="doc.body", source="from.site"), bpe)
    assert found == [("x", "7", OK)]
    (tmp_path / "d.jsonl").write_text('{"text": "x", "source": "\\ud800"}')
    assert read(corpus(tmp_path / "d.jsonl"), bpe) == [("x", "���", OK)]
    path = write_parquet(tmp_path / "c.parquet", ["x", "y"], meta=[{"redpajama_set_name": "RedPajamaC4"}] * 2)
    assert [s for _, s, _ in read(corpus(path), bpe)] == ["RedPajamaC4"] * 2


def test_invalid_utf8_is_replaced_skipped_or_an_error_and_counted(bpe: Path, tmp_path: Path) -> None:
    good = lines(["fine", "too"])
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "caf\xe9"}\n' + b'{"text": "half \\ud800"}\n' + good)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")
    source = corpus(tmp_path / "a.jsonl", tmp_path / "b.txt")
    found = read(source, bpe)
    assert [t for t, _, _ in found] == ["fine", "too", "caf�", "half ���", "fine", "too", "caf� au lait"]
    assert [s for _, _, s in found] == [OK, OK, REPAIRED, REPAIRED, OK, OK, REPAIRED]
    found = read(source, bpe, invalid="skip")
    assert [(t, n) for t, n, s in found if s == SKIPPED] == [("", UNREADABLE)] * 3
    with pytest.raises(InputError, match=r"a\.jsonl:3: invalid UTF-8 at byte 13"):
        read(source, bpe, invalid="error")
    with pytest.raises(InputError, match=r"b\.txt: invalid UTF-8 at byte 3"):
        read(corpus(tmp_path / "b.txt"), bpe, invalid="error")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "torn', "malformed JSON"),
        (b"[1, 2]", "a JSON array instead of one object per line"),
        (b"3", "not a JSON object"),
        (b'{"content": "x", "id": 1}', r"no field 'text' \(it has content, id\)"),
        (b'{"text": 5}', "field 'text' is not a string"),
        (b'{"text": null}', "field 'text' is not a string"),
    ],
)
def test_a_malformed_line_is_reported_by_its_number(line: bytes, what: str, bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS) + b"\n" + line + b"\n" + lines(["after"]))
    source = corpus(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=rf"a\.jsonl:{len(TEXTS) + 2}: {what}.*skip-malformed"):
        read(source, bpe)
    found = read(source, bpe, skip_malformed=True)
    assert found[-2:] == [("", UNREADABLE, MALFORMED), ("after", UNNAMED, OK)]


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lines(TEXTS)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(whole)[:-40])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(whole)[:-40])
    (tmp_path / "bad.jsonl.zst").write_bytes(zstandard.compress(whole)[:20] + b"rubbish" * 9)
    for name in ("cut.jsonl.gz", "cut.jsonl.zst", "bad.jsonl.zst"):
        with refused(InputError, name):
            list(corpus(tmp_path / name).chunks(START))
    (tmp_path / "no.parquet").write_bytes(b"")
    with refused(InputError, "no.parquet"):
        list(corpus(tmp_path / "no.parquet").chunks(START))
    write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(InputError, match=r"no field 'body'; set --text-field; it has text"):
        list(corpus(tmp_path / "a.parquet", text="body").chunks(START))
    with pytest.raises(InputError, match=r"no field 'site'; set --source-field; it has text"):
        list(corpus(tmp_path / "a.parquet", source="site").chunks(START))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.pdf").write_bytes(bz2.compress(b""))
    for name in ("empty", "gone.jsonl", "./x"):
        with refused(InputError, name):
            find_parts([str(tmp_path / name) if name != "./x" else name])
    with refused(InputError, "-"):
        find_parts(["-", "-"])

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with refused(InputError, "user/name"):
        corpus("user/name").fingerprint()


def test_a_hub_dataset_is_streamed_and_known_by_its_commit(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load(name: str, *, split: str, streaming: bool, revision: str | None) -> Any:
        assert (name, split, streaming, revision) == ("user/name", "train", True, "v2")
        return datasets.Dataset.from_dict({"text": TEXTS, "source": ["web"] * len(TEXTS)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = corpus("user/name@v2")
    assert read(source, bpe) == [(t, "web", OK) for t in TEXTS]
    assert read(source, bpe, start=Place(0, 290, 290)) == [(t, "web", OK) for t in TEXTS[290:]]


def test_fingerprint_distinguishes_inputs_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    data = lines(TEXTS) * 400
    for folder in ("x", "y"):
        (tmp_path / folder / "a.jsonl").write_bytes(data)
    same = corpus(tmp_path / "x" / "a.jsonl").fingerprint()
    assert corpus(tmp_path / "y").fingerprint() == same
    (tmp_path / "y" / "a.jsonl").write_bytes(b"x" + data[1:])
    assert corpus(tmp_path / "y").fingerprint() != same


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BufferedReader(io.BytesIO(data))  # type: ignore[type-var]


@pytest.mark.parametrize("squeezed", [bytes, gzip.compress, zstandard.compress])
def test_stdin_is_json_lines_or_one_text(squeezed: Any, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(squeezed(lines(TEXTS))))
    source = corpus("-")
    prints = {source.fingerprint()}
    assert read(source, bpe) == [(t, UNNAMED, OK) for t in TEXTS]
    monkeypatch.setattr("sys.stdin", Stdin(squeezed(lines(TEXTS))))
    at = [c.start for c in corpus("-").chunks(START)][3]
    monkeypatch.setattr("sys.stdin", Stdin(squeezed(lines(TEXTS))))
    assert [t for t, _, _ in read(corpus("-"), bpe, start=at)] == TEXTS[at.line :]
    monkeypatch.setattr("sys.stdin", Stdin(squeezed(b"One story.\n{not JSON}\n")))
    source = corpus("-")
    prints.add(source.fingerprint())
    assert read(source, bpe) == [("One story.\n{not JSON}\n", UNNAMED, OK)]
    assert len(prints) == 2


def lvctx(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([warm_server.start(), *map(str, arguments)], input=stdin, capture_output=True)


def test_the_command_ends_with_one_line_and_code_3(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(lines(["fine"]) + b"{torn\n")
    named = lines(["x"], source="web")
    cases = [
        ([tmp_path / "bad.jsonl"], b"", "bad.jsonl:2: malformed JSON"),
        (["-"], b"", "-: no documents in the input"),
        (["-"], b'{"text": ""}\n', "0 tokens of 1 documents passed the length rule: less than one row of 16"),
        (["-"], named, "source 'web' is not in the mix (which has RedPajamaC4"),
        (["-"], lines(["x"]) + named, "source 'web' after documents without one"),
    ]
    for inputs, stdin, line in cases:
        out = tmp_path / "out"
        done = lvctx("pack-text", *inputs, "-o", out, "--tokenizer", bpe, "--seq-len", "16", stdin=stdin)
        error = done.stderr.decode()
        assert (done.returncode, done.stdout) == (3, b""), error
        assert line in error
        assert error.count("\n") == 1


def test_stdin_to_stdout(bpe: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_documents(50, seed=1))
    data = (tmp_path / "a.jsonl").read_bytes()
    arguments = ["pack-text", "-", "-o", tmp_path / "out", "--tokenizer", bpe, "--seq-len", "32", "--keep-short", "1"]
    done = lvctx(*arguments, stdin=data)
    row = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert row["schema"] == "lvctx.packed/1"
    assert set(row) == {"schema", "path", "sha256", "rows", "tokens", "seq_len"}
    assert json.loads(lvctx(*arguments, stdin=data).stdout) == row
    assert lvctx(*arguments, stdin=data[:-5] + b'abc"}').returncode == 3  # finished, and of another input
    plan = json.loads(lvctx(*arguments, "--tokens", "2K", "--dry-run", stdin=data).stdout)
    assert plan["tokens"] == 2000
    assert plan["separator_token"] == "<|endoftext|>"


def test_chunk_names_its_documents() -> None:
    chunk = Chunk(start=Place(0, 0, 9), end=Place(1, 0, 0), where="a.jsonl")
    assert chunk.name(0) == "a.jsonl:10"
