"""Rows of results without what the clock says of them."""

from collections.abc import Iterable
from typing import Any


def without_cost(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row without its `cost`, for exact comparisons: the same work takes another time."""
    return [{key: value for key, value in row.items() if key != "cost"} for row in rows]
