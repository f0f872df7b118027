"""The table of docs/runtimes.md from the JSON lines of the runners.

python tests/runtimes/table.py ROWS.jsonl... -o docs/runtimes.md
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

HEAD = """\
# What is written, in other runtimes

Tiny random models of every kind that lvctx writes were loaded by each runtime in float32 on a CPU and compared with
what lvctx computes: the largest difference of a log-probability over a prompt of 900 tokens, whether {new} greedy
tokens are equal, and for VLMs whether the greedy answers of stock transformers about an image and a video are. A model
passes below 0.001. `make test-runtimes` makes this table; {date}.

"""


def cell(row: dict[str, Any] | None) -> str:
    """What a runtime did with a model."""
    if row is None:
        return ""
    if "error" in row:
        return "cannot: " + row["error"].replace("|", "/")[:160]
    parts = [f"{row['difference']:.1e}" if row.get("difference") is not None else "not a number"]
    parts += [f"{name} {'equal' if row[name] else 'differ'}" for name in ("tokens", "image", "video") if name in row]
    return ", ".join(parts)


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for path in args.rows for line in path.read_text().split("\n") if line.startswith("{")]
    runtimes, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("runtime", "model"))
    found = {(row["model"], row["runtime"]): row for row in rows}
    lines = [f"| model | {' | '.join(runtimes)} |", "|---" * (1 + len(runtimes)) + "|"]
    for model in models:
        lines.append(f"| {model} | {' | '.join(cell(found.get((model, runtime))) for runtime in runtimes)} |")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(HEAD.format(new=8, date=date) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
