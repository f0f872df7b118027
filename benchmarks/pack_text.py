"""Tokens per second of `lvctx pack-text` against the tokenizers library's own batch call on the same text.

    python benchmarks/pack_text.py --tokenizer MODEL_DIR --text FOLDER_OF_TXT [--megabytes 32] [--rounds 3]

The ceiling is `Tokenizer.encode_batch_fast` alone: documents already decoded in memory, ids never fetched into Python,
with 1 and with 2 of its own threads. The packer is the whole command, from JSON lines on disk to the hashed manifest,
with 1 and with 2 workers, its start included. Every round runs all four one after another, each in a process of its
own, so that a busy machine hits all alike; the ratio is taken inside a round. `cpu` is the same ratio in processor
seconds, which other programs on the machine disturb less. One JSON line a round, then the medians.
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
from pathlib import Path

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


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
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
