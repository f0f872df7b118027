"""What every runner does alike: a JSON line a model in OUT/RUNNER.jsonl, whatever becomes of the model."""

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_rows(out: Path, names: list[str], runtime: str, measure: Callable[[Path, str, Row], Row]) -> None:
    """Write a row for each of `names` (default: all in reference.json) with what `measure` returns, or the error.

    The file has the runner's name: run_vllm.py writes OUT/vllm.jsonl.
    """
    reference = json.loads((out / "reference.json").read_text())
    runner = Path(sys.argv[0]).stem.removeprefix("run_")
    with (out / f"{runner}.jsonl").open("w") as file:
        for name in names or reference:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    row = measure(out, name, reference[name])
            except RuntimeError as e:  # the runner's word, and most runtimes' own
                row = {"error": " ".join(str(e).split())}
            except Exception as e:
                row = {"error": " ".join(f"{type(e).__name__}: {e}".split())}
            numbers = {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
            line = json.dumps({"runtime": runtime, "model": name, **row, **numbers})
            print(line, flush=True)
            print(line, file=file, flush=True)


def refusal(path: Path, runtime: str) -> str | None:
    """Why a runtime cannot run a model, as the model's card says; None where it can."""
    start = f"- {runtime}: cannot "
    lines = (path / "README.md").read_text().splitlines() if (path / "README.md").is_file() else []
    return next((line.removeprefix(start) for line in lines if line.startswith(start)), None)
