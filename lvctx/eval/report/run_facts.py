"""What the report shows of a run of any kind: the model, how the results were computed, and what they cost."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lvctx.artifacts.manifest import MANIFEST, read_provenance
from lvctx.artifacts.store import sha256_file
from lvctx.errors import InputError
from lvctx.eval.benchmarks.protocol import describe_protocol
from lvctx.eval.cost_summary import summarize_costs
from lvctx.eval.report.run_files import RunFile, printable

PROVENANCE = ("schema", "version", "command", "config", "config_hash", "inputs", "seed")
"""What the report shows of a manifest."""
SHARED_FACTS = (
    "run",
    "schema",
    "made_of",
    "kv_cache",
    "visual",
    "haystack",
    "needles",
    "trained_length",
    "longest_sample",
)
"""What the report shows of the facts that all rows of a run share."""


def describe_run(run: RunFile) -> dict[str, Any]:
    """The fields that runs of all kinds have: name, file, model, protocol, samples, failures, provenance, costs."""
    rows = list(run.rows.values())
    first = rows[0] if rows else {}
    made_of = first.get("made_of")
    protocol = made_of.get("protocol") if isinstance(made_of, dict) else None
    model = first.get("model")
    return {
        "name": run.name,
        "path": printable(run.path),
        "kind": run.kind,
        "model": model if isinstance(model, str) else None,
        "protocol": describe_protocol(protocol) if isinstance(protocol, dict) else None,
        "samples": len(rows),
        "failures": count_errors(rows),
        "costs": summarize_costs(rows).get("cost", {}),
        "provenance": {
            "sha256": sha256_file(run.path),
            **{key: first[key] for key in SHARED_FACTS if key in first},
            **({"model": facts} if isinstance(model, str) and (facts := read_manifest_facts(Path(model))) else {}),
        },
        "warnings": [],
    }


def read_manifest_facts(directory: Path) -> dict[str, Any]:
    """The provenance in a directory's manifest; empty if it has none that can be read."""
    try:
        provenance = (read_provenance(directory) or {}) if (directory / MANIFEST).is_file() else {}
    except (InputError, OSError):
        return {}
    return {key: provenance[key] for key in PROVENANCE if key in provenance}


def count_errors(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of failed samples with their numbers, the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        if "error" in row:
            message = str(row["error"])
            counts[message] = counts.get(message, 0) + 1
    return [{"error": error, "count": count} for error, count in sorted(counts.items(), key=lambda item: -item[1])]
