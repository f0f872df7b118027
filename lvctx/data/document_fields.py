"""The fields of a record that hold a document and the name of its source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lvctx.errors import InputError

UNNAMED = "unnamed"
"""The source of documents without one."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields of a record; a dot separates the keys of nested objects."""

    text: str = "text"
    """The document."""
    source: str | None = None
    """The source's name; None tries `source`, then SlimPajama's `meta.redpajama_set_name`."""

    def source_paths(self) -> tuple[str, ...]:
        """Fields tried for the source; the first existing one is used."""
        return (self.source,) if self.source else ("source", "meta.redpajama_set_name")

    def columns(self, names: Sequence[str], *, where: str) -> list[str]:
        """Those columns of a table that hold text and sources. Raises InputError if a given field is in none."""
        for flag, field in (("--text-field", self.text), ("--source-field", self.source)):
            if field and field not in names and field.split(".")[0] not in names:
                raise InputError(f"no field {field!r}", where=where, fix=f"set {flag}; it has {', '.join(names)}")
        paths = (self.text, *self.source_paths())
        return list({path if path in names else path.split(".")[0] for path in paths} & set(names))

    def source_of(self, record: dict[str, Any]) -> str:
        """The source a record names, or UNNAMED."""
        for path in self.source_paths():
            source = dig(record, path)
            if isinstance(source, str | int):
                # JSON can encode a lone surrogate, which a manifest cannot store.
                return str(source).encode(errors="surrogatepass").decode(errors="replace")
        return UNNAMED


def dig(record: Any, path: str) -> Any:
    """`record["a"]["b"]` for path `a.b`, or `record["a.b"]` if it has that; None if anything is missing."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record
