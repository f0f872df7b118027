"""What a run's results cost: totals and medians of the `cost` of its rows."""

import math
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from lvctx.cost import PEAK


def summarize_costs(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"cost": {...}}` of the results that state what they cost; empty if none does. Errors are left out.

    `samples` are these results, `total` and `median` are of each of their numbers (`peak_memory_bytes` has a maximum in
    place of a total), and `samples_per_second` is by the sum of their seconds, whatever ran at once.
    """
    costs = [_numbers(row["cost"]) for row in rows if "error" not in row and isinstance(row.get("cost"), dict)]
    values: dict[str, list[float]] = {}
    for cost in costs:
        for key, value in cost.items():
            values.setdefault(key, []).append(value)
    if not values:
        return {}
    seconds = sum(sum(column) for key, column in values.items() if key.endswith("_seconds"))
    total = {key: max(column) if key == PEAK else sum(column) for key, column in values.items()}
    return {
        "cost": {
            "samples": len(costs),
            "samples_per_second": round(len(costs) / seconds, 6) if seconds else None,
            "total": {key: _rounded(value) for key, value in total.items()},
            "median": {key: _rounded(median(column)) for key, column in values.items()},
        }
    }


def _numbers(cost: Mapping[str, Any]) -> dict[str, float]:
    numbers = {k: v for k, v in cost.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 6)
