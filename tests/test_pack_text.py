"""pack-text against an independent packer in plain Python, against stock transformers, and against kill -9."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Nano
from support import warm_server
from support.refusals import refused
from test_cli import on_terminal

from lvctx.artifacts.manifest import read_manifest
from lvctx.data import documents
from lvctx.data import tokenization as tokenize
from lvctx.data.pack_text import plan_pack_text, run_pack_text
from lvctx.data.pack_text_config import PackTextConfig
from lvctx.data.packed import PackedRows
from lvctx.data.row_packing import uniform
from lvctx.errors import InputError, UsageError

TEXT = "the long book of rivers and mountains was read by nobody but the moon 0 1 2 3 4 5 é 漢字 \n"
WORDS = tuple(TEXT.split(" "))


def make_tokenizer(out: Path) -> Path:
    """A byte-level BPE with 400 ids, an <|endoftext|> and no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    tokenizer.enable_truncation(16)  # what a careless export leaves in the file must not shorten documents
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return out


def make_documents(count: int, *, seed: int, sources: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(np.exp(rng.uniform(0, 6)))
        document: dict[str, Any] = {"text": " ".join(rng.choice(WORDS, length))}
        if sources:
            document["source"] = str(rng.choice(sources))
        documents.append(document)
    return documents


def write_lines(path: Path, documents: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(d, ensure_ascii=i % 2 == 0) + "\n" for i, d in enumerate(documents))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer")


def pack(
    out: Path,
    *inputs: Path | str,
    tokenizer: Path,
    workers: int = 1,
    mix: str = "auto",
    separator: str = "auto",
    **o: Any,
) -> PackedRows:
    """Run the stage; `o` are its options over small defaults."""
    options: dict[str, Any] = {"seq_len": 64, "min_long": 100, "keep_short": 0.3, "shard_tokens": 1024, **o}
    run = {key: options.pop(key) for key in ("resume", "force") if key in options}
    config = PackTextConfig(
        inputs=tuple(str(i) for i in inputs),
        out=out,
        tokenizer=str(tokenizer),
        separator=separator,
        mix=mix,
        workers=workers,
        **options,
    )
    run_pack_text(plan_pack_text(config), on_progress=lambda done, total, note: None, **run)
    return PackedRows(out)


def encode(tokenizer: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    loaded.no_truncation()
    return loaded.encode(text, add_special_tokens=False).ids


def reference(
    documents: list[list[int]], *, separator: int, seq_len: int, min_long: int, keep_short: float, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows and document starts, one token at a time."""
    draws = uniform(seed, np.arange(len(documents)))
    stream: list[int] = []
    begins: list[int] = []
    for ids, draw in zip(documents, draws, strict=True):
        if ids and (len(ids) > min_long or draw < keep_short):
            begins.append(len(stream))
            stream += [separator, *ids]
    rows = [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    starts = [[b - i * seq_len for b in begins if i * seq_len <= b < (i + 1) * seq_len] for i in range(len(rows))]
    return rows, starts


def contents(directory: Path) -> dict[str, str]:
    """Every file and what is in it, so that a difference shows which file it is in."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_rows_and_starts_equal_a_packer_that_goes_token_by_token(bpe: Path, tmp_path: Path) -> None:
    texts = make_documents(120, seed=1)
    write_lines(tmp_path / "a.jsonl", texts[:70])
    write_lines(tmp_path / "b.jsonl.gz", texts[70:])
    rows = pack(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tokenizer=bpe)
    expected, starts = reference(
        [encode(bpe, d["text"]) for d in texts], separator=0, seq_len=64, min_long=100, keep_short=0.3
    )
    assert len(rows) == len(expected) > 20
    assert len(rows.manifest["files"]) > 1
    for i, row in enumerate(expected):
        assert rows.row(i).tolist() == row
        assert rows.row(i).dtype == np.int32
        assert rows.doc_starts(i).tolist() == starts[i]
        marks = [j in starts[i] for j in range(64)]
        assert rows.documents(i).tolist() == [sum(marks[1 : j + 1]) for j in range(64)]
        assert rows.positions(i).tolist() == [j - max([0, *(s for s in starts[i] if s <= j)]) for j in range(64)]
    assert rows.manifest["separator"] == {"id": 0, "token": "<|endoftext|>"}
    account = rows.manifest["sources"]["unnamed"]
    assert account["documents"] == 120
    assert sum(account["before_documents"]) == 120
    assert sum(account["before_tokens"]) == account["tokens"] == sum(len(encode(bpe, d["text"])) for d in texts)
    assert account["packed"] == rows.manifest["tokens"] + rows.manifest["tail"]["tokens"]
    assert sum(account["after_documents"]) == 120 - account["too_short"] - account["empty"]


@pytest.mark.nano
def test_ids_equal_the_stock_tokenizer(nano: Nano, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(nano.lm)
    files = sorted(nano.essays.glob("*.txt"))[:12]
    odd = tmp_path / "odd.txt"
    odd.write_text("  <|endoftext|> two\u2028lines\r\n\t漢字 ✨ <|im_start|>user\n" * 30, encoding="utf-8")
    rows = pack(tmp_path / "out", *files, odd, tokenizer=nano.lm, seq_len=512, keep_short=1.0, keep_tail=True)
    texts = [f.read_bytes().decode(errors="replace") for f in [*files, odd]]
    expected: list[int] = []
    for text in texts:
        ids = stock(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        expected += [stock.bos_token_id, *ids]
    found = np.concatenate([rows.row(i) for i in range(len(rows))]).tolist()
    assert found[: len(expected)] == expected
    assert set(found[len(expected) :]) <= {stock.bos_token_id}
    assert rows.manifest["tokens"] == len(expected)


@pytest.mark.parametrize("mix", ["none", "keep"])
def test_workers_change_no_byte(bpe: Path, tmp_path: Path, mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MEBIBYTE", 1 << 15)
    texts = make_documents(2000, seed=2, sources=("web", "book"))
    source = write_lines(tmp_path / "a.jsonl", texts)
    assert source.stat().st_size > 10 << 15  # many chunks
    if mix == "keep":
        source = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(texts), source, row_group_size=700)
    pack(tmp_path / "one", source, tokenizer=bpe, workers=1, mix=mix, shard_tokens=20000)
    pack(tmp_path / "three", source, tokenizer=bpe, workers=3, mix=mix, shard_tokens=20000)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    other = pack(tmp_path / "seed", source, tokenizer=bpe, workers=3, mix=mix, shard_tokens=20000, seed=1)
    assert len(other) > 0
    assert contents(tmp_path / "one") != contents(tmp_path / "seed")


@pytest.mark.parametrize("mix", ["none", "keep"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(bpe: Path, tmp_path: Path, mix: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(3000, seed=3, sources=("web", "book")) * 3)
    assert source.stat().st_size > 2 << 20  # several chunks
    command = ["pack-text", str(source), "--tokenizer", str(bpe), "--seq-len", "64"]
    command += ["--min-long", "100", "--keep-short", "0.3", "--mix", mix, "--shard-tokens", "16384", "--workers", "1"]
    subprocess.run([warm_server.start(), *command, "-o", tmp_path / "whole"], check=True, capture_output=True)
    out, kills = tmp_path / "killed", 0
    for wanted in (1, 3, 6, 8, 11):
        child = warm_server.Command(*command, "-o", out, stdout=subprocess.DEVNULL)
        stand = len(list(out.glob("shard-*"))) + len(list(out.glob(".part-*")))
        deadline = time.monotonic() + 30
        while child.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob("shard-*"))) + len(list(out.glob(".part-*"))) >= max(wanted, stand):
                break
            time.sleep(0.001)
        if child.poll() is None:
            kills += 1
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stderr is not None
        child.stderr.close()
    assert kills >= 2
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    subprocess.run([warm_server.start(), *command, "-o", out], check=True, capture_output=True)
    assert contents(tmp_path / "whole") == contents(out)
    redone = [name for name, at in before.items() if (out / name).stat().st_mtime_ns != at]
    assert len(redone) <= 1


def test_resume_from_every_shard(bpe: Path, tmp_path: Path) -> None:
    """What a run killed after n shards leaves is n shards: for each n the rest must come out the same."""
    source = write_lines(tmp_path / "a.jsonl", make_documents(60, seed=4))
    whole = tmp_path / "whole"
    rows = pack(whole, source, tokenizer=bpe, tokens=3000)
    assert len(rows) == 3000 // 64
    shards = sorted(whole.glob("shard-*"))
    for count in range(len(shards)):
        out = tmp_path / f"resumed-{count}"
        out.mkdir()
        for shard in shards[:count]:
            os.link(shard, out / shard.name)
        (out / ".shard-00009.safetensors.partial").write_bytes(b"torn")
        pack(out, source, tokenizer=bpe, tokens=3000)
        assert contents(whole) == contents(out)


def test_a_run_that_began_with_longer_chunks_is_continued(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard's place is a chunk and a document in it, and the version that continues may cut shorter chunks."""
    source = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(make_documents(60, seed=4)), source)
    rows = pack(tmp_path / "out", source, tokenizer=bpe)
    whole = [(rows.row(i).tolist(), rows.doc_starts(i).tolist()) for i in range(len(rows))]
    sources = rows.manifest["sources"]
    shards = sorted((tmp_path / "out").glob("shard-*"))
    assert len(shards) > 2
    for path in (tmp_path / "out" / "MANIFEST.json", *shards[2:]):
        path.unlink()
    monkeypatch.setattr(documents, "_MOST_ROWS", 7)
    rows = pack(tmp_path / "out", source, tokenizer=bpe, resume="must")
    assert [(rows.row(i).tolist(), rows.doc_starts(i).tolist()) for i in range(len(rows))] == whole
    assert rows.manifest["sources"] == sources


def test_a_finished_run_is_left_alone_and_another_is_not_overwritten(bpe: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(60, seed=4))
    pack(tmp_path / "out", source, tokenizer=bpe)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    pack(tmp_path / "out", source, tokenizer=bpe)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"holds another run's output.*seq_len: 64 -> 32"):
        pack(tmp_path / "out", source, tokenizer=bpe, seq_len=32)
    with refused(InputError, "out"):
        pack(tmp_path / "out", source, tokenizer=bpe, resume="never")
    assert pack(tmp_path / "out", source, tokenizer=bpe, seq_len=32, force=True).seq_len == 32
    with refused(InputError, "new"):
        pack(tmp_path / "new", source, tokenizer=bpe, resume="must")


def test_a_given_mix_is_met_exactly_and_shares_are_recorded(bpe: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(600, seed=5, sources=("web", "book", "junk")))
    (tmp_path / "mix.toml").write_text("web = 3\nbook = 1\njunk = 0\n")
    rows = pack(tmp_path / "out", source, tokenizer=bpe, mix=str(tmp_path / "mix.toml"), tokens=6400)
    sources = rows.manifest["sources"]
    assert len(rows) == 100
    assert {s: a["packed"] for s, a in sources.items()} == {"web": 4800, "book": 1600, "junk": 0}
    assert sources["web"]["share_requested"] == sources["web"]["share_achieved"] == 0.75
    assert sources["junk"]["over_budget"] > 0
    # Without --tokens: as many as the scarcest source allows, and not one row more.
    most = pack(tmp_path / "most", source, tokenizer=bpe, mix=str(tmp_path / "mix.toml"))
    eligible = {s: a["eligible"] for s, a in most.manifest["sources"].items()}
    assert sum(a["packed"] for a in most.manifest["sources"].values()) == pytest.approx(
        min(eligible["web"] / 0.75, eligible["book"] / 0.25), abs=4
    )


def test_keep_keeps_the_inputs_own_shares(bpe: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(600, seed=6, sources=("web", "web", "book")))
    for s in pack(tmp_path / "out", source, tokenizer=bpe, mix="keep").manifest["sources"].values():
        assert s["share_achieved"] == pytest.approx(s["share_of_input"], abs=1e-3)
    plain = pack(tmp_path / "none", source, tokenizer=bpe, mix="none").manifest["sources"]
    assert all(s["share_requested"] is None and s["over_budget"] == 0 for s in plain.values())


def test_slimpajamas_names_get_its_shares(bpe: Path, tmp_path: Path) -> None:
    from lvctx.data.mixture import SLIMPAJAMA

    texts = make_documents(900, seed=7)
    for i, document in enumerate(texts):
        document["meta"] = {"redpajama_set_name": list(SLIMPAJAMA)[i % 7]}
    rows = pack(tmp_path / "out", write_lines(tmp_path / "a.jsonl", texts), tokenizer=bpe)
    for source, share in SLIMPAJAMA.items():
        assert rows.manifest["sources"][source]["share_achieved"] == pytest.approx(share, abs=1e-3)
    few = [d for d in texts if "Book" not in d["meta"]["redpajama_set_name"]]
    with pytest.raises(InputError, match=r"RedPajamaBook.* no documents"):
        pack(tmp_path / "few", write_lines(tmp_path / "few.jsonl", few), tokenizer=bpe)
    with pytest.raises(InputError, match=r"budget cannot be met \(.*RedPajamaBook needs 265472 and has \d+: \d+ short"):
        pack(tmp_path / "big", tmp_path / "a.jsonl", tokenizer=bpe, tokens=6_400_000)


def test_long_documents_all_stay_and_short_ones_seldom(bpe: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(1500, seed=8))
    account = pack(tmp_path / "out", source, tokenizer=bpe, keep_short=0.1).manifest["sources"]["unnamed"]
    assert account["before_documents"][8:] == account["after_documents"][8:]  # 128 tokens and longer
    short_before, short_after = sum(account["before_documents"][:7]), sum(account["after_documents"][:7])
    assert short_after / short_before == pytest.approx(0.1, abs=0.03)


def test_the_length_rule_counts_tokens_and_means_longer_than(bpe: Path, tmp_path: Path) -> None:
    document = {"text": "the long book of rivers and mountains é 漢字"}
    length = len(encode(bpe, document["text"]))
    source = write_lines(tmp_path / "a.jsonl", [document] * 20)
    kept = pack(tmp_path / "kept", source, tokenizer=bpe, min_long=length - 1, keep_short=0.0)
    assert kept.manifest["sources"]["unnamed"]["too_short"] == 0
    with pytest.raises(InputError, match="less than one row of 64"):
        pack(tmp_path / "gone", source, tokenizer=bpe, min_long=length, keep_short=0.0)


@pytest.mark.parametrize(("separator", "found"), [("auto", 0), ("</s>", 1), ("7", 7)])
def test_separator(bpe: Path, tmp_path: Path, separator: str, found: int) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(60, seed=4))
    rows = pack(tmp_path / "out", source, tokenizer=bpe, separator=separator)
    assert rows.row(0)[0] == rows.manifest["separator"]["id"] == found


@pytest.mark.parametrize("separator", ["auto", "</s>", "<sep>"])
def test_special_tokens_that_a_document_writes_are_text(bpe: Path, tmp_path: Path, separator: str) -> None:
    """As `split_special_tokens` has it: the separators alone are control tokens. `<sep>` is no special token."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    loaded.add_tokens(["<sep>"])
    shutil.copytree(bpe, tmp_path / "tokenizer")
    loaded.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    texts = ["the <|endoftext|> of </s>", "</s><|endoftext|> a <sep> b", "<|endoftext|>"] * 30
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    rows = pack(tmp_path / "out", source, tokenizer=tmp_path / "tokenizer", separator=separator, keep_short=1.0)
    controls = {0, 1, loaded.token_to_id(rows.manifest["separator"]["token"])}
    ids = np.concatenate([rows.row(i) for i in range(len(rows))]).tolist()
    assert {i for i in ids if i in controls} == {rows.manifest["separator"]["id"]}
    assert sum(i in controls for i in ids) == sum(len(rows.doc_starts(i)) for i in range(len(rows)))
    first = ids[1 : ids.index(ids[0], 1)]
    loaded.no_truncation()
    assert "".join(loaded.id_to_token(i) for i in first).replace("Ġ", " ") == texts[0]


def test_a_special_token_that_no_text_can_spell_is_named(tmp_path: Path) -> None:
    """Unigram has `</s>` among its pieces."""
    from tokenizers import Tokenizer, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "<>/sabcdefghijklmnopqrtuvwxyz ")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    (tmp_path / "unigram").mkdir()
    tokenizer.save(str(tmp_path / "unigram" / "tokenizer.json"))
    options: dict[str, Any] = {"tokenizer": tmp_path / "unigram", "separator": "</s>", "seq_len": 4, "keep_short": 1.0}
    lines = '{"text": "the book É"}\n\n{"text": "ends </s> here"}\n{"text": "<unk> a book"}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    with refused(InputError, "a.jsonl:3"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", **options)
    rows = pack(tmp_path / "out", tmp_path / "a.jsonl", skip_malformed=True, **options)
    assert rows.manifest["sources"]["unreadable"]["malformed"] == 1


def test_a_lone_surrogate_is_named_by_its_line(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n\n{"text": "\\ud83d"}\n')
    with refused(InputError, "a.jsonl:4"):
        pack(tmp_path / "out", tmp_path / "a.jsonl", tokenizer=bpe, invalid="error")


def test_wrong_numbers_are_reported_before_anything_is_read(bpe: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(5, seed=4))
    with pytest.raises(UsageError, match="less than 2"):
        pack(tmp_path / "out", source, tokenizer=bpe, seq_len=1)
    with pytest.raises(UsageError, match="less than one row"):
        pack(tmp_path / "out", source, tokenizer=bpe, tokens=10)
    with pytest.raises(InputError, match="no token 'nope'"):
        pack(tmp_path / "out", source, tokenizer=bpe, separator="nope")
    with pytest.raises(InputError, match="no token 9999"):
        pack(tmp_path / "out", source, tokenizer=bpe, separator="9999")
    with refused(InputError, str(tmp_path / "none")):
        pack(tmp_path / "out", source, tokenizer=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def die(chunk: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_one_line_and_resumable(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(60, seed=4))
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "_encode", die)
        with pytest.raises(InputError, match=r"tokenizing process died.*run again"):
            pack(tmp_path / "out", source, tokenizer=bpe)
    assert len(pack(tmp_path / "out", source, tokenizer=bpe)) > 0


def test_the_reader_refuses_what_is_not_whole(bpe: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", make_documents(60, seed=4))
    rows = pack(tmp_path / "out", source, tokenizer=bpe)
    with pytest.raises(IndexError):
        rows.row(len(rows))
    shard = tmp_path / "out" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with refused(InputError, "shard-00001.safetensors"):
        PackedRows(tmp_path / "out")
    (tmp_path / "out" / "MANIFEST.json").unlink()
    with refused(InputError, "out"):
        PackedRows(tmp_path / "out")


def test_a_narrow_terminal_cuts_nothing_short(bpe: Path, tmp_path: Path) -> None:
    names = ("RedPajamaCommonCrawl", "RedPajamaStackExchange")
    source = write_lines(tmp_path / "a.jsonl", make_documents(60, seed=1, sources=names))
    rows = pack(tmp_path / "out", source, tokenizer=bpe, mix="keep")
    shown = on_terminal("info", tmp_path / "out", columns=80)
    packed = [read_manifest(tmp_path / "out")["sources"][name]["packed"] for name in names]
    assert sum(packed) >= len(rows) * rows.seq_len
    for name, tokens in zip(names, packed, strict=True):
        assert any(line.startswith(name) and f" {tokens:,} " in line for line in shown.splitlines())
