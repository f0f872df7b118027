"""Rows of a dataset of the `datasets` package: a folder it saved, a Parquet file, or an id on the hub (split `train`).

Pictures that lie in the rows become files, named by their content: from then on they are read like any others, when
they are needed.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvctx.errors import InputError
from lvctx.text.hub import no_dataset, open_dataset

ROWS = 256
"""Rows in memory with their pictures."""


FILES = (".json", ".jsonl", ".ndjson", ".gz", ".zst")
"""How files of rows are named; a hub id never is."""


def is_table(path: Path) -> bool:
    """Whether this is a dataset rather than a JSON or JSONL file, there or not."""
    named = not path.is_absolute() and len(path.parts) == 2 and path.suffix not in FILES
    return path.suffix == ".parquet" or path.is_dir() or (named and not path.exists())


def read_table(path: Path, images: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row after how errors name it; pictures in `image` or `images` are written to the folder `images`.

    Raises InputError where there is no such dataset or it cannot be read.
    """
    number = 0
    batches = _batches(path)
    while (batch := _next(batches, path)) is not None:
        for row in batch:
            for key in ("image", "images"):
                if row.get(key) is not None:
                    row[key] = _name(row[key], images)
            yield f"{path}[{number}]", row
            number += 1


def _next(batches: Iterator[list[dict[str, Any]]], path: Path) -> list[dict[str, Any]] | None:
    try:
        return next(batches, None)
    except InputError:
        raise
    except Exception as e:  # whatever the hub client and the dataset's own reader raise
        raise no_dataset(str(path), e) from e


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield from (batch.to_pylist() for batch in file.iter_batches(ROWS))
        return
    # Arrow's own rows: a picture stays the bytes it is stored as.
    stored = open_dataset(str(path), "train", saved=path.is_dir()).with_format("arrow")
    yield from (batch.to_pylist() for batch in stored.iter(ROWS))


def _name(cell: Any, folder: Path) -> Any:
    """A file name for each picture of a cell; what is one already stays."""
    if isinstance(cell, list):
        return [_name(one, folder) for one in cell]
    if not isinstance(cell, dict) or cell.get("bytes") is None:
        return cell.get("path") if isinstance(cell, dict) else cell
    name = hashlib.sha256(cell["bytes"]).hexdigest()[:32] + Path(cell.get("path") or "").suffix
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.{os.getpid()}.partial"
        partial.write_bytes(cell["bytes"])
        partial.replace(folder / name)
    return name
