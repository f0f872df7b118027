"""What a run's results cost, as a report prints it. Files of a run have no costs: equal results give equal files."""

from pathlib import Path
from typing import Any


def run_costs(run: Path) -> dict[str, Any]:
    """See `summarize_costs`, of a results directory; empty for a file of others."""
    from lvctx.artifacts.result_log import read_results
    from lvctx.eval.cost_summary import summarize_costs

    return summarize_costs(read_results(run).values()) if run.is_dir() else {}


def print_costs(name: str, result: dict[str, Any]) -> None:
    """Print total and median of each number of a result's `cost`; nothing if it has none."""
    from rich.console import Console
    from rich.table import Table

    if "cost" not in result:
        return
    cost = result["cost"]
    rate = f", {cost['samples_per_second']:.3g} per second" if cost["samples_per_second"] else ""
    table = Table(
        "cost",
        title=f"{name}: cost of {cost['samples']:,} samples{rate}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("total", "median"):
        table.add_column(column, justify="right")
    for key in cost["total"]:
        values = (_amount(key, cost[column][key]) for column in ("total", "median"))
        table.add_row(key.removesuffix("_seconds").removesuffix("_bytes").replace("_", " "), *values)
    Console(markup=False, emoji=False).print(table)


def _amount(key: str, value: float) -> str:
    if key.endswith("_seconds"):
        return f"{value:,.3f} s"
    return f"{value / 2**30:.2f} GiB" if key.endswith("_bytes") else f"{value:,g}" if value % 1 else f"{int(value):,}"
