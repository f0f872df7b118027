"""The table of docs/runtimes.md from what the runners wrote.

python tests/runtimes/table.py OUT -o docs/runtimes.md
"""

import argparse
import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

HEAD = """\
# Outputs of lvctx in other runtimes

`make test-runtimes` writes tiny random models of every kind that lvctx writes, loads each in each runtime in float32 on
a CPU, and makes this table. The last run was on {date}, with torch {torch} and transformers {transformers} for what
lvctx computes. An empty cell was not run.

- The numbers for vLLM and llama.cpp are the largest difference from a log-probability that lvctx computes: for vLLM of
  a prompt of 900 tokens and of {new} greedy tokens after it, for llama.cpp of the {new}. A difference below 0.001
  passes.
- "tokens", "text", "image" and "video" show whether {new} greedy tokens are equal after that prompt, in answer to text
  of 900 letters, and in answer to a question about an image and a video.
- vLLM gives another answer about a video for Qwen3-VL, also where its positions are not extended. The prompt's token
  ids are equal, and transformers' own forward gives lvctx's answer. Where vLLM computes something else is not known.
- llama.cpp gets the flags of `llama.cpp.txt`; a Qwen-VL model's are for a GGUF of the model before it was extended.
- llama.cpp reads no `rms_norm_eps` of a Qwen2-VL or Qwen2.5-VL file and computes with 0 (builds 11434 and 11549:
  `src/models/qwen2vl.cpp` reads the M-RoPE sections alone), so it differs more there. Their `rms_norm_eps` is 1e-6
  here, as in the released checkpoints. With 1e-5, log-probabilities after 1, 30 and 900 tokens differed by 1.1e-3,
  1.3e-3 and 2.4e-3; with 0 for the norms of lvctx's model by 1.3e-6, 6.0e-6 and 3.2e-4.
- TRL: the loss of one step of its SFTTrainer with LoRA, for a VLM on a conversation with an image.
- PEFT: the largest difference from the merged model's log-probabilities when it puts `adapter/` on the model that was
  trained, and the most that the adapter moves one. The adapter is kept in bfloat16, which has 8 bits: up to 0.4 % is
  rounding.

The target needs no compiler. The environments take 9 GB of disk in `.runtimes` (`make RUNTIMES=DIR test-runtimes` puts
them elsewhere). From the processor time of its parts, expect about half an hour on
two cores, the packages' installation included.

"""
COLUMNS = ("vllm", "llama_cpp", "serve", "trl", "peft")
"""Names of the runners' files."""


def cell(row: dict[str, Any] | None) -> str:
    """What a runtime did with a model."""
    if row is None:
        return ""
    if "error" in row:
        return "cannot: " + row["error"].replace("|", "/")[:160]
    parts = ["cannot " + row["refusal"]] if "refusal" in row else []
    for key, form in (("difference", "{:.1e}"), ("moved", "of {:.1f}"), ("loss", "loss {:.2f}")):
        if key in row:
            parts.append("not a number" if row[key] is None else form.format(row[key]))
    shown = ("tokens", "text", "image", "video")
    parts += [f"{name} {'equal' if row[name] else 'differ'}" for name in shown if name in row]
    return ", ".join(parts)


def read(path: Path) -> list[dict[str, Any]]:
    """A runner's rows; none where it was not run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="as reference.py and the runners wrote it")
    parser.add_argument("-o", "--page", type=Path, required=True)
    args = parser.parse_args()
    reference = json.loads((args.out / "reference.json").read_text())
    rows = {name: read(args.out / f"{name}.jsonl") for name in COLUMNS}
    columns = [{row["model"]: row for row in found} for found in rows.values() if found]
    runtimes = [next(iter(column.values()))["runtime"] for column in columns]
    lines = [f"| model | {' | '.join(runtimes)} |", "|---" * (1 + len(runtimes)) + "|"]
    lines += [f"| {model} | {' | '.join(cell(column.get(model)) for column in columns)} |" for model in reference]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    new = len(next(iter(reference.values()))["greedy"])
    args.page.write_text(
        HEAD.format(new=new, date=date, torch=version("torch"), transformers=version("transformers"))
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
