"""The table of docs/runtimes.md from what the runners wrote.

python tests/runtimes/table.py OUT -o docs/runtimes.md
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

HEAD = """\
# What is written, in other runtimes

`make test-runtimes` writes tiny random models of every kind that lvctx writes, loads each in each runtime in float32 on
a CPU, and makes this table, last on {date}. The numbers are the largest difference from a log-probability that lvctx
computes: for vLLM and PEFT over a prompt of 900 tokens, for vLLM and llama.cpp over {new} greedy tokens after it. A
difference below 0.001 passes. "tokens", "text", "image" and "video" say whether the {new} greedy tokens after that
prompt, after a chat of 900 letters, and about an image and a video are equal. For TRL the loss of one step with LoRA is
given, for PEFT the difference between `adapter/` on the model that was trained and the merged weights.

The target takes about an hour on two cores, most of it for building llama.cpp and installing the packages, and 15
minutes again after that. It needs a C++ compiler and 6 GB of disk in `.runtimes` (or `make RUNTIMES=DIR
test-runtimes`), more where pip has torch with CUDA.

"""
COLUMNS = ("vllm", "llama_cpp", "serve", "trl", "peft")
"""Names of the runners' files."""


def cell(row: dict[str, Any] | None) -> str:
    """What a runtime did with a model."""
    if row is None:
        return ""
    if "error" in row:
        return "cannot: " + row["error"].replace("|", "/")[:160]
    parts = ["cannot: " + row["refusal"]] if "refusal" in row else []
    for key, form in (("difference", "{:.1e}"), ("moved", "of {:.1f}"), ("loss", "loss {:.2f}")):
        if key in row:
            parts.append("not a number" if row[key] is None else form.format(row[key]))
    shown = ("tokens", "text", "image", "video")
    parts += [f"{name} {'equal' if row[name] else 'differ'}" for name in shown if name in row]
    return ", ".join(parts)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="as reference.py and the runners wrote it")
    parser.add_argument("-o", "--page", type=Path, required=True)
    args = parser.parse_args()
    reference = json.loads((args.out / "reference.json").read_text())
    columns = []
    for name in COLUMNS:
        rows = [json.loads(line) for line in (args.out / f"{name}.jsonl").read_text().splitlines()]
        columns.append({row["model"]: row for row in rows})
    runtimes = [next(iter(column.values()))["runtime"] for column in columns]
    lines = [f"| model | {' | '.join(runtimes)} |", "|---" * (1 + len(runtimes)) + "|"]
    lines += [f"| {model} | {' | '.join(cell(column.get(model)) for column in columns)} |" for model in reference]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = len(next(iter(reference.values()))["greedy"])
    args.page.write_text(HEAD.format(new=new, date=date) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
