"""The contents of an artifact or model directory, read from headers and manifests only: no tensor is loaded."""

from math import prod
from pathlib import Path
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import MANIFEST, read_manifest, read_provenance
from lvctx.artifacts.model_config import language_part, read_model_config
from lvctx.artifacts.packed_manifest import check_packed_manifest
from lvctx.artifacts.result_log import RESULTS, read_results
from lvctx.artifacts.sniff import encode_first, mistaken, sniff
from lvctx.artifacts.store import read_json, read_safetensors_header
from lvctx.artifacts.weights import read_headers
from lvctx.errors import InputError


def describe(path: Path) -> dict[str, Any]:
    """Facts about an artifact: its provenance, and the shapes, counts or configuration of its kind.

    Raises InputError for a path that is neither an lvctx artifact nor a model directory.
    """
    if path.is_file():
        return _describe_file(path)
    if not path.is_dir():
        raise InputError("no such file or directory", where=path)
    facts: dict[str, Any] = {"path": str(path)}
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        unit = {schemas.PACKED: "documents", schemas.CHAT: "samples"}.get(manifest.get("schema", ""))
        if unit:
            check_packed_manifest(manifest, path)
        facts |= _describe_packed(manifest, unit) if unit else manifest
    if (path / "config.json").is_file():
        facts["model"] = _describe_model(path)
    if (path / RESULTS).is_file():
        facts |= _describe_results(path)
    if len(facts) == 1:
        raise mistaken(path, "an lvctx artifact or a model directory")
    return facts


def _describe_packed(manifest: dict[str, Any], unit: str) -> dict[str, Any]:
    """The manifest with its files counted, and one length histogram over all sources: bin -> `unit` and tokens."""
    facts = {k: v for k, v in manifest.items() if k not in ("files", "shard_rows", "length_bins", "sources")}
    facts["shards"] = len(manifest["shard_rows"])
    facts["bytes"] = sum(file["bytes"] for file in manifest["files"].values())
    counts = (f"before_{unit}", "before_tokens", f"after_{unit}", "after_tokens")
    sources = manifest["sources"]
    facts["lengths"] = {
        name: {count: sum(account[count][b] for account in sources.values()) for count in counts}
        for b, name in enumerate(manifest["length_bins"])
        if any(account[f"before_{unit}"][b] for account in sources.values())
    }
    facts["sources"] = {
        source: {k: v for k, v in account.items() if k not in counts} for source, account in sources.items()
    }
    return facts


def _describe_results(path: Path) -> dict[str, Any]:
    """What all rows of a results directory have in common, their number, and the summary of a finished one."""
    rows = list(read_results(path).values())
    shared = {k: v for k, v in rows[0].items() if k != "key" and all(r.get(k) == v for r in rows)} if rows else {}
    facts = {**shared, "cells": len(rows), "errors": sum("error" in row for row in rows)}
    summary = path / "summary.json"
    if summary.is_file():
        facts["summary"] = read_json(summary)
    return facts


def _describe_file(path: Path) -> dict[str, Any]:
    sniffed = sniff(path)
    if sniffed.name not in ("frames", "tensors"):
        fix = encode_first(path) if sniffed.name == "video" else "info describes artifacts and model directories"
        raise mistaken(path, "an lvctx artifact", fix=fix, sniffed=sniffed)
    header = read_safetensors_header(path)
    tensors = {k: f"{v['dtype']} {v['shape']}" for k, v in sorted(header.items()) if k != "__metadata__"}
    return {"path": str(path), "bytes": path.stat().st_size, **(read_provenance(path) or {}), "tensors": tensors}


def _describe_model(path: Path) -> dict[str, Any]:
    config = read_model_config(path)
    text = language_part(config)
    shards = read_headers(path)
    architectures = config.get("architectures")
    rope = text.get("rope_parameters") or {**_object(text.get("rope_scaling")), "rope_theta": text.get("rope_theta")}
    facts = {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else config["model_type"],
        "parameters": sum(prod(entry["shape"]) for header in shards.values() for entry in header.values()),
        "bytes": sum((path / shard).stat().st_size for shard in shards),
        "context": text.get("max_position_embeddings"),
        "rope": rope,
        "layers": text.get("num_hidden_layers"),
        "hidden_size": text.get("hidden_size"),
        "vocabulary": text.get("vocab_size"),
    }
    vision = _object(config.get("vision_config"))
    image, patch = vision.get("image_size"), vision.get("patch_size")
    if isinstance(image, int) and isinstance(patch, int) and 0 < patch <= image:
        facts["tower"] = {"architecture": vision.get("model_type"), "image_size": image}
        if config["model_type"] == "llava_onevision":  # other classes merge patches in other ways
            facts["tower"]["tokens_per_frame"] = ((image // patch + 1) // 2) ** 2
    return facts


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
