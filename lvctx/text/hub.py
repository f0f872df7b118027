"""Datasets of the `datasets` package: saved on disk (memory-mapped) or on the Hugging Face hub (streamed)."""

from collections.abc import Iterator
from typing import Any

from lvctx.errors import InputError, first_line

ROWS = 64
"""Rows in memory at once, with their images."""


def open_dataset(name: str, split: str, *, saved: bool) -> Any:
    """A saved dataset (memory-mapped) or one on the hub (streamed). Raises InputError where there is none."""
    import datasets

    try:
        if saved:
            stored = datasets.load_from_disk(name)
            if not isinstance(stored, datasets.DatasetDict):
                return stored
            if split not in stored:
                raise InputError(f"no split {split!r}", where=name, fix=f"--split: it has {', '.join(stored)}")
            return stored[split]
        repository, _, revision = name.partition("@")
        return datasets.load_dataset(repository, split=split, streaming=True, revision=revision or None)
    except InputError:
        raise
    except Exception as e:  # whatever the hub client and the dataset's own reader raise
        raise no_dataset(name, e) from e


def dataset_rows(name: str, split: str, *, saved: bool, start: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a dataset from row `start` on. Raises InputError where there is none or it cannot be read.

    Images are the bytes or paths that are stored.
    """
    stored = open_dataset(name, split, saved=saved).with_format("arrow")
    try:
        for batch in (stored.skip(start) if start else stored).iter(ROWS):
            yield from batch.to_pylist()
    except Exception as e:  # whatever the hub client and the dataset's own reader raise
        raise no_dataset(name, e) from e


def hub_commit(name: str) -> str:
    """The commit that a hub dataset stands at. Raises InputError when the hub does not know it or does not answer."""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    try:
        return str(HfApi().dataset_info(repository, revision=revision or None).sha)
    except Exception as e:
        raise no_dataset(name, e) from e


def no_dataset(name: str, e: Exception) -> InputError:
    """The one line a user sees for whatever the hub client or the dataset's reader raised."""
    return InputError(f"neither a file or folder here nor a dataset the hub gives ({first_line(e)})", where=name)
