"""A training in the report: its curves, from metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvctx.eval.cost_summary import summarize_costs
from lvctx.eval.report.run_facts import describe_run, read_manifest_facts
from lvctx.eval.report.run_files import RunFile, check_fields

MOST_POINTS = 500
"""Points of a curve: of longer ones, means over equally many steps are shown."""


def training_section(run: RunFile) -> dict[str, Any]:
    """The run with its curves, the time and tokens of its steps, and the manifest of its model."""
    check_fields(run.rows, {"step": int, "loss": (int, float)})
    rows = [numbers_of(row) for row in run.rows.values()]
    section = describe_run(run)
    manifest = read_manifest_facts(run.path.parent)
    section["provenance"] |= {"manifest": manifest} if manifest else {}
    costs = ({"cost": {k: row[k] for k in ("seconds", "tokens") if k in row}} for row in rows)
    section["costs"] = summarize_costs(costs).get("cost", {})
    return section | {"curves": curves(rows), "command": manifest.get("command"), "loss": rows[-1]["loss"]}


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric columns of a step; the learning rate of a group is `lr_GROUP`."""
    rates = row.get("lr")
    columns = {**row, **{f"lr_{k}": v for k, v in (rates.items() if isinstance(rates, dict) else ())}}
    return {k: v for k, v in columns.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def curves(rows: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Column -> (step, value) pairs, thinned to `MOST_POINTS`."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    size = -(-len(rows) // MOST_POINTS)
    found = {}
    for name in names:
        pairs = [(row["step"], row[name]) for row in rows if name in row]
        parts = [pairs[first : first + size] for first in range(0, len(pairs), size)]
        found[name] = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    return found
