"""Records of chat samples. Images that rows hold, as bytes or base64, are written to files named by their content."""

import base64
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lvctx.data.records import Record, read_records
from lvctx.errors import InputError


def chat_records(path: Path, folder: Path) -> Iterator[Record]:
    """Records of a file or dataset. Images in its rows are written to `folder` and replaced by their file names."""
    for record in read_records(path):
        if isinstance(record.value, dict):
            for key in record.value.keys() & {"image", "images"}:
                record.value[key] = _stored_image(record.value[key], folder)
            if encoded := record.value.get("image_base64_str"):
                encoded = [encoded] if isinstance(encoded, str) else encoded
                try:
                    cells = [{"bytes": base64.b64decode(text, validate=True)} for text in encoded]
                except (TypeError, ValueError):
                    yield Record(record.where, InputError("`image_base64_str` is not base64", where=record.where))
                    continue
                record.value["images"] = _stored_image(cells, folder)
        yield record


def _stored_image(cell: Any, folder: Path) -> Any:
    """The file name of each image of a cell; names are kept."""
    if isinstance(cell, list):
        return [_stored_image(one, folder) for one in cell]
    if not isinstance(cell, dict):
        return cell
    content, path = cell.get("bytes"), cell.get("path")
    if not isinstance(content, bytes):
        return path
    name = hashlib.sha256(content).hexdigest()[:32] + Path(path or "").suffix
    if not (folder / name).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.{os.getpid()}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    return name
