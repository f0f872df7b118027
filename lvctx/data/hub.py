"""Datasets of the `datasets` package: saved on disk (memory-mapped) or on the Hugging Face hub (streamed)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lvctx.errors import InputError, library_errors

ROWS = 64
"""Number of rows in memory at once, with their images."""
NO_DATASET = "neither a local file or folder nor a dataset that could be downloaded"


def dataset_rows(name: str, split: str, *, saved: bool, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a dataset from row `start` on, images as the stored bytes or paths.

    Raises InputError if there is no such dataset, or it cannot be read.
    """
    import datasets

    stored: Any
    with library_errors(NO_DATASET, where=name):
        if saved:
            stored = datasets.load_from_disk(name)
            if isinstance(stored, datasets.DatasetDict):
                if split not in stored:
                    raise InputError(f"no split {split!r}", where=name, fix=f"set --split; it has {', '.join(stored)}")
                stored = stored[split]
        else:
            repository, _, revision = name.partition("@")
            stored = datasets.load_dataset(repository, split=split, streaming=True, revision=revision or None)
        stored = stored.with_format("arrow")
        for batch in (stored.skip(start) if start else stored).iter(ROWS):
            yield from batch.to_pylist()


def hub_commit(name: str) -> str:
    """The current commit of a hub dataset. Raises InputError if it is not found or the hub does not respond."""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    with library_errors(NO_DATASET, where=name):
        return str(HfApi().dataset_info(repository, revision=revision or None).sha)


def hub_datasets(inputs: Iterable[str | Path]) -> list[str]:
    """The ids, without revisions, of those inputs that are datasets on the hub and not files or stdin."""
    return sorted({str(name).partition("@")[0] for name in inputs if str(name) != "-" and not Path(name).exists()})
