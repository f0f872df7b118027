"""The shape of a packed or chat directory's manifest: checked once, so that readers may take every key as it is."""

from pathlib import Path
from typing import Any

from lvctx.errors import InputError


def check_packed_manifest(manifest: dict[str, Any], directory: Path) -> None:
    """Raise InputError for a manifest that lacks what `pack-text` or `pack-chat` writes, or has it in another form."""
    files, rows, sources = (manifest.get(key) for key in ("files", "shard_rows", "sources"))
    length = manifest.get("seq_len", manifest.get("target_length"))
    bins = manifest.get("length_bins")
    right = {
        "files": isinstance(files, dict)
        and all(isinstance(f, dict) and _is_count(f.get("bytes")) for f in files.values()),
        "shard_rows": isinstance(rows, list) and all(map(_is_count, rows)),
        "rows": isinstance(rows, list) and manifest.get("rows") == sum(n for n in rows if _is_count(n)),
        "seq_len": _is_count(length) and length != 0,
        "inputs": isinstance(manifest.get("inputs"), dict),
        "config": isinstance(manifest.get("config"), dict),
        "length_bins": isinstance(bins, list) and all(isinstance(name, str) for name in bins),
        "sources": isinstance(sources, dict)
        and isinstance(bins, list)
        and all(_is_account(account, len(bins)) for account in sources.values()),
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise InputError(
            f"{', '.join(wrong)} in MANIFEST.json: not what the command writes", where=directory, fix="pack it again"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_account(account: Any, bins: int) -> bool:
    """Whether these are a source's counts, with histograms of so many bins."""
    if not isinstance(account, dict):
        return False
    histograms = [value for key, value in account.items() if key.startswith(("before_", "after_"))]
    numbers = [value for value in account.values() if not isinstance(value, list)]
    return (
        len(histograms) == 4
        and all(isinstance(h, list) and len(h) == bins and all(map(_is_count, h)) for h in histograms)
        and all(value is None or type(value) in (int, float) for value in numbers)
    )
