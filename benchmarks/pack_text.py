"""Speed of `lvctx pack-text`: against the tokenizers library, of the process that decides, and of many workers.

    python benchmarks/pack_text.py --tokenizer MODEL_DIR --text FOLDER_OF_TXT [--megabytes 32] [--rounds 3]
    python benchmarks/pack_text.py --tokenizer MODEL_DIR --part deciding [--before CHECKOUT]
    python benchmarks/pack_text.py --tokenizer MODEL_DIR --part workers [--workers 16] [--rate 450000]

The first compares with `Tokenizer.encode_batch_fast` alone: documents already decoded in memory, ids never fetched into
Python, with 1 and with 2 of its own threads. The packer is the whole command, from JSON lines on disk to the hashed
manifest, with 1 and with 2 workers, its start included. Every round runs all four one after another, each in a process
of its own, so that a busy machine hits all alike; the ratio is taken inside a round. `cpu` is the same ratio in
processor seconds, which other programs on the machine disturb less. One JSON line a round, then the medians.

`deciding` gives millions of tokens per processor second of the process that selects, copies, writes and hashes, for
documents of 200 to 20,000 tokens, log-uniform: with their ids in memory (`ids`, and `ids_keep` with `--mix keep`, which
writes them twice), and in the whole command with two workers whose tokenizer returns ready ids, from JSON lines and
from Parquet. `copy` is one copy of the ids in memory, the limit. `--before` measures another checkout in turns.

`workers` gives tokens per second for workers that sleep as long as tokenizing takes at `--rate` tokens per second, from
Parquet: with real tokenizing, more workers than cores only share the cores. `share` is that of workers x rate.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.data import pack_text, tokenization
from lvctx.data.documents import Chunk, Place
from lvctx.data.pack_text_config import PackTextConfig
from lvctx.data.tokenization import Tokens

RAW = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
tokenizer.no_truncation(); tokenizer.no_padding()
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
tokenizer.encode_batch_fast(texts[:20], add_special_tokens=False)
began, cpu, count = time.perf_counter(), time.process_time(), 0
for i in range(0, len(texts), 2000):
    count += sum(len(e) for e in tokenizer.encode_batch_fast(texts[i : i + 2000], add_special_tokens=False))
print(json.dumps({"tokens": count, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}))
"""


def make_corpus(folder: Path, out: Path, megabytes: int) -> None:
    """Paragraphs of the texts in random order, 1 to 128 of them a document, log-uniform."""
    paragraphs = [p for f in sorted(folder.rglob("*.txt")) for p in f.read_text(errors="replace").split("\n\n")]
    draw = random.Random(0)
    size = 0
    with open(out, "w", encoding="utf-8") as f:
        while size < megabytes << 20:
            count = int(2 ** draw.uniform(0, 7))
            line = json.dumps({"text": "\n\n".join(draw.choices(paragraphs, k=count))}, ensure_ascii=False)
            size += f.write(line + "\n")


def raw(tokenizer: Path, corpus: Path, threads: int) -> tuple[float, float]:
    """Tokens of the batch call per second and per processor second."""
    command = [sys.executable, "-c", RAW, str(tokenizer / "tokenizer.json"), str(corpus)]
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    return done["tokens"] / done["seconds"], done["tokens"] / done["cpu"]


def packed(tokenizer: Path, corpus: Path, workers: int, out: Path) -> tuple[float, float]:
    """Tokens read by the whole command per second and per processor second."""
    command = [sys.executable, "-m", "lvctx", "pack-text", str(corpus), "-o", str(out), "--tokenizer", str(tokenizer)]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--seq-len", "65536", "--workers", str(workers)], check=True, capture_output=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    manifest = json.loads((out / "MANIFEST.json").read_text())
    shutil.rmtree(out)
    tokens = sum(account["tokens"] for account in manifest["sources"].values())
    return tokens / seconds, tokens / cpu


READY_TOKENS = 1 << 25
MEAN_TOKENS = int((20_000 - 200) / np.log(20_000 / 200))
BYTES_PER_TOKEN = 4
CHUNK_TOKENS = (1 << 20) // BYTES_PER_TOKEN


def make_lengths(total: int) -> list[int]:
    """Tokens of documents, log-uniform from 200 to 20,000, about `total` together."""
    logarithms = np.random.default_rng(0).uniform(np.log(200), np.log(20_000), total // MEAN_TOKENS)
    return np.exp(logarithms).astype(int).tolist()


@contextmanager
def job(source: Path, tokenizer: Path, *, workers: int, mix: str) -> Iterator[pack_text.PackTextJob]:
    """A run that keeps all documents, with an output that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        yield pack_text.plan_pack_text(
            PackTextConfig(
                inputs=(str(source),),
                out=Path(folder) / "out",
                tokenizer=str(tokenizer),
                seq_len=65536,
                keep_short=1.0,
                mix=mix,
                workers=workers,
            )
        )


def run_job(planned: pack_text.PackTextJob) -> tuple[float, list[tuple[float, int]]]:
    """Tokens per processor second of this process, and (time, bytes of input done) at each chunk."""
    seen: list[tuple[float, int]] = []
    before = time.process_time()
    manifest = pack_text.run_pack_text(
        planned, on_progress=lambda done, total, note: seen.append((time.perf_counter(), done))
    )
    return manifest["tokens"] / (time.process_time() - before), seen


def make_ids(lengths: list[int]) -> list[Tokens]:
    """Chunks of tokenized documents of two sources."""
    chunks: list[Tokens] = []
    for some in np.array_split(np.array(lengths), max(1, sum(lengths) // CHUNK_TOKENS)):
        draw, at = np.random.default_rng(len(chunks)), len(chunks)
        starts = np.cumsum([0, *(some + 1)]).astype(np.int64)
        place, after = Place(0, at, at), Place(0, at + 1, at + 1)
        chunks.append(
            Tokens(
                chunk=Chunk(start=place, end=after, where="ready"),
                ids=draw.integers(1, 10_000, starts[-1], dtype=np.int32),
                starts=starts,
                status=np.zeros(len(some), np.uint8),
                names=("web", "book"),
                codes=draw.integers(0, 2, len(some)).astype(np.int32),
            )
        )
    return chunks


class ReadyIds:
    """Stands in for the tokenizer in a worker: ids by the length of a text, after the time that tokenizing takes."""

    def __init__(self) -> None:
        self.ids = list(range(1, 20_001))

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        """Objects with a length and `ids`, like those of the tokenizers library."""
        began, rate = time.perf_counter(), float(os.environ.get("PACK_TEXT_RATE", 0))
        done = [_Ids(self.ids[: len(text) // BYTES_PER_TOKEN]) for text in texts]
        if rate:
            time.sleep(max(0.0, sum(map(len, done)) / rate - (time.perf_counter() - began)))
        return done


class _Ids(list[int]):
    @property
    def ids(self) -> list[int]:
        return self


start_worker = tokenization._start


def start_ready_worker(content: str, options: dict[str, Any]) -> None:
    """As a worker starts, with `ReadyIds`."""
    start_worker(content, options)
    assert tokenization._encoder is not None
    tokenization._encoder.tokenizer = ReadyIds()


def write_inputs(folder: Path, lengths: list[int]) -> dict[str, Path]:
    """The same documents as JSON lines and as Parquet in row groups of 1,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = "".join(np.random.default_rng(0).choice(list("etaoinshrdlu    "), 1 << 20))
    texts = [words[n : n + n * BYTES_PER_TOKEN].ljust(n * BYTES_PER_TOKEN, "e") for n in lengths]
    paths = {"lines": folder / "a.jsonl", "parquet": folder / "a.parquet"}
    paths["lines"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), paths["parquet"], row_group_size=1000)
    return paths


def deciding(tokenizer: Path) -> dict[str, float]:
    """Millions of tokens per processor second of the process that decides."""
    lengths = make_lengths(READY_TOKENS)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder), lengths)
        tokenization._start = start_ready_worker
        for name, path in inputs.items():
            with job(path, tokenizer, workers=2, mix="none") as planned:
                rates[name] = run_job(planned)[0]
        chunks = make_ids(lengths)
        pack_text.tokenize = lambda *_, **__: (chunk for chunk in chunks)  # type: ignore[assignment]
        for mix in ("none", "keep"):
            with job(inputs["lines"], tokenizer, workers=1, mix=mix) as planned:
                rates["ids" if mix == "none" else "ids_keep"] = run_job(planned)[0]
    ids = np.ones(READY_TOKENS, np.int32)
    copy = ids.copy()
    before = time.process_time()
    copy[:] = ids
    rates["copy"] = READY_TOKENS / (time.process_time() - before)
    return {name: round(rate / 1e6, 1) for name, rate in rates.items()}


def many_workers(tokenizer: Path, workers: int, rate: float) -> dict[str, float]:
    """Tokens per second once all workers have begun, the share of workers x rate, and of this process as above."""
    os.environ["PACK_TEXT_RATE"] = str(rate)
    with tempfile.TemporaryDirectory() as folder:
        source = write_inputs(Path(folder), make_lengths(int(workers * rate * 20)))["parquet"]
        tokenization._start = start_ready_worker
        with job(source, tokenizer, workers=workers, mix="none") as planned:
            tokens = sum(make_lengths(int(workers * rate * 20)))
            per_second, seen = run_job(planned)
    skip = 8 * workers
    share_read = (len(seen) - 1 - skip) / len(seen)
    speed = share_read * tokens / (seen[-1][0] - seen[skip][0])
    return {
        "workers": workers,
        "tokens_per_second": round(speed),
        "share": round(speed / workers / rate, 3),
        "deciding": round(per_second / 1e6, 1),
    }


def measure_parts(options: argparse.Namespace) -> None:
    """Rounds of `deciding` or `workers`, each in a process of its own, of this checkout and the one before."""
    trees = {"now": Path(__file__).resolve().parent.parent, **({"before": options.before} if options.before else {})}
    flags = ["--part", options.part, "--workers", str(options.workers), "--rate", str(options.rate), "--once"]
    command = [sys.executable, __file__, "--tokenizer", str(options.tokenizer), *flags]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(options.rounds):
        for name, tree in trees.items():
            env = {**os.environ, "PYTHONPATH": str(tree)}
            rows[name].append(json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout))
            print(json.dumps({"tree": name, **rows[name][-1]}), flush=True)
    medians = {
        name: {key: statistics.median(row[key] for row in some) for key in some[0]} for name, some in rows.items()
    }
    print(json.dumps({"cores": os.cpu_count(), "median": medians}))


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--part", choices=("speed", "deciding", "workers"), default="speed")
    parser.add_argument("--text", type=Path, help="needed for speed")
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout, measured in the same rounds")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--rate", type=float, default=450_000.0, help="tokens per second of one worker")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        workers = (options.workers, options.rate)
        part = deciding(options.tokenizer) if options.part == "deciding" else many_workers(options.tokenizer, *workers)
        print(json.dumps(part))
        return
    if options.part != "speed":
        measure_parts(options)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus.jsonl", Path(folder) / "packed"
        make_corpus(options.text, corpus, options.megabytes)
        for number in range(options.rounds):
            row: dict[str, float] = {"round": number}
            for n in (1, 2):
                ceiling, ceiling_cpu = raw(options.tokenizer, corpus, n)
                speed, speed_cpu = packed(options.tokenizer, corpus, n, out)
                row |= {f"raw_{n}": round(ceiling), f"packed_{n}": round(speed)}
                row |= {f"ratio_{n}": round(speed / ceiling, 3), f"cpu_{n}": round(speed_cpu / ceiling_cpu, 3)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "round"}
    print(json.dumps({"cores": os.cpu_count(), "megabytes": options.megabytes, "median": medians}))


if __name__ == "__main__":
    main()
