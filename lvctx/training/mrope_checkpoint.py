"""Extend a Qwen-VL checkpoint by changing only its config.json; weights are linked, not rewritten (GIRAFFE 3.2).

The authors' released code replaces a class that Qwen2-VL does not use. Here M-RoPE++ is expressed with rope_parameters
of stock transformers, so any program that loads the checkpoint computes it; programs that read them differently
get side files (`models/side_files.py`).
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import MANIFEST, Provenance, listed_files, open_output, read_manifest, write_manifest
from lvctx.artifacts.model_config import language_part, read_model_config
from lvctx.artifacts.store import fingerprint, link_file, write_json
from lvctx.errors import InputError, UsageError
from lvctx.models.card import CARD
from lvctx.models.card_metadata import write_card
from lvctx.models.loading import load_config, resolve_model
from lvctx.models.side_files import SGLANG, SIDE_FILES, with_rope, write_side_files
from lvctx.rope.mrope import Mrope, RopeScaling, to_hf
from lvctx.rope.scaling import rope_number
from lvctx.training.mrope_config import MropeConfig

COMMAND = "mrope-extend"
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types with M-RoPE."""

RELEASED = 32_768
"""Pretrained length of the released Qwen2-VL and Qwen2.5-VL; the latter's config.json allows 128,000."""

INTERLEAVED = "time, height and width alternate over all frequencies, so no section can be interpolated or kept"
"""The reason why M-RoPE++ is not defined for Qwen3-VL."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The positions of a Qwen-VL directory."""

    path: Path
    """Resolved directory."""
    model_type: str
    """One of `MODEL_TYPES`."""
    mrope: Mrope
    """The pretrained positions, also if the checkpoint is already scaled."""
    scaling: RopeScaling | None
    """The scaling of a checkpoint written by this project; None otherwise."""
    scaling_text: str
    """Description of its scaling; empty for a plain checkpoint."""
    length: int | None
    """Pretrained length in tokens, if the configuration determines it."""
    context: int
    """`max_position_embeddings` of config.json."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a resolved directory. Raises InputError for a model without M-RoPE or with invalid sections."""
    config = load_config(path)
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"{config.model_type} has no M-RoPE",
            where=path,
            fix="use lvctx extend-lm --rope ntk for one-dimensional RoPE, also of a VLM's language model",
        )
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters is {rope!r}", where=path / "config.json", fix="correct it")
    interleaved = config.model_type == "qwen3_vl"
    stored = rope.get("mrope_section") or ([24, 20, 20] if interleaved else [16, 24, 24])
    sections = tuple(stored) if isinstance(stored, list | tuple) else (0,)
    valid = len(sections) == 3 and all(type(n) is int and n > 0 for n in sections)
    if not valid or sum(sections) != head_dim // 2:
        raise InputError(
            f"mrope_section {stored} does not sum to {head_dim // 2}, half of the head's {head_dim} channels",
            where=path / "config.json",
            fix="correct it; Qwen2-VL has [16, 24, 24]",
        )
    ours = _made_by_us(path)
    theta = ours["theta"] if ours else rope_number(rope, "rope_theta", above=1.0)
    mrope = Mrope(head_dim=head_dim, theta=theta, sections=sections, interleaved=interleaved)
    kind, length, words = rope.get("rope_type", "default"), _stated_length(path, config.model_type), ""
    if ours:
        length = ours["original"]
        words = f"by {ours['factor']:g} with {ours['method']}"
    elif kind != "default":
        length = rope.get("original_max_position_embeddings")
        words = f"by {rope_number(rope, 'factor', above=0.0):g} with {kind}" if "factor" in rope else f"with {kind}"
    scaling = RopeScaling(**{key: ours[key] for key in ("method", "ramp", "factor", "original")}) if ours else None
    return Checkpoint(
        path=path,
        model_type=config.model_type,
        mrope=mrope,
        scaling=scaling,
        scaling_text=words,
        length=length,
        context=text.max_position_embeddings,
    )


def _made_by_us(path: Path) -> dict[str, Any] | None:
    """The configuration of our run that wrote this checkpoint; None for other checkpoints."""
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    return manifest["config"] if manifest.get("command") == COMMAND else None


def _stated_length(path: Path, model_type: str) -> int | None:
    raw = read_model_config(path)
    length = language_part(raw).get("max_position_embeddings", raw.get("max_position_embeddings"))
    return None if model_type == "qwen2_5_vl" and length != RELEASED else length


@dataclass(frozen=True, kw_only=True)
class MropeJob:
    """A checked run."""

    config: MropeConfig
    """The user's options; for a training, with every default resolved."""
    checkpoint: Checkpoint
    """The checkpoint to extend."""
    scaling: RopeScaling
    """The scaling with every default resolved."""
    context: int
    """Context length in tokens of the new config.json."""
    provenance: Provenance
    """What identifies the run."""
    note: str
    """The reason for another default method than M-RoPE++; empty otherwise."""

    @property
    def rope(self) -> dict[str, Any]:
        """The new rope_parameters."""
        return to_hf(self.checkpoint.mrope, self.scaling)

    def describe(self) -> dict[str, Any]:
        """Facts for the output row."""
        return {**asdict(self.scaling), "context": self.context}


def resolve_mrope(config: MropeConfig, *, force: bool = False) -> MropeJob:
    """Check the checkpoint and resolve the defaults; loads no weights.

    Raises UsageError for options that do not apply to the model, InputError for a model that cannot be extended, is
    already extended (unless `force`), or does not have its pretrained length.
    """
    scale, method, ramp = config.scale, config.method, config.ramp
    if not (scale >= 1 and math.isfinite(scale)):
        raise UsageError(f"--scale {scale:g} is less than 1", fix="give new length over pretrained length, e.g. 4")
    checkpoint = read_checkpoint(resolve_model(config.model))
    if checkpoint.scaling_text and not force:
        raise InputError(
            f"is already scaled {checkpoint.scaling_text}",
            where=checkpoint.path,
            fix="start from the released checkpoint, or --force to replace the old scale",
        )
    note = ""
    if checkpoint.mrope.interleaved:
        if method == "mrope++":
            raise UsageError(f"no M-RoPE++ for {checkpoint.model_type}: {INTERLEAVED}", fix="--method yarn")
        note = "" if method else f"yarn, because in {checkpoint.model_type} {INTERLEAVED}"
    length = config.original_length or checkpoint.length
    if length is None:
        raise InputError(
            f"config.json does not state the pretrained length (it allows {checkpoint.context} positions)",
            where=checkpoint.path,
            fix=f"give --original-length ({RELEASED} for the released Qwen2.5-VL)",
        )
    scaling = RopeScaling(
        method=method or ("yarn" if note else "mrope++"), ramp=ramp, factor=float(scale), original=length
    )
    provenance = Provenance(
        schema=schemas.MODEL,
        command=COMMAND,
        config={**asdict(scaling), "theta": checkpoint.mrope.theta},
        inputs={"model": fingerprint(checkpoint.path)},
    )
    return MropeJob(
        config=config,
        checkpoint=checkpoint,
        scaling=scaling,
        context=round(scale * length),
        provenance=provenance,
        note=note,
    )


def run_mrope(job: MropeJob, out: Path, *, resume: str, force: bool, command: str = "") -> None:
    """Write the extended checkpoint; a finished one is not changed. Raises InputError if writing fails.

    `command` is the command line, without local paths, for the model card.
    """
    if out.resolve() == job.checkpoint.path.resolve():
        raise UsageError("-o is the model's own directory", fix="choose another directory")
    with open_output(out, job.provenance, resume=resume, force=force) as unfinished:
        if unfinished:
            clear(out)
            files, facts = write_checkpoint(job, out)
            write_card(out, job.provenance, facts, sources=[job.checkpoint.path], command=command)
            write_manifest(out, job.provenance, files, **facts)


def write_checkpoint(
    job: MropeJob, out: Path, *, weights: Callable[[], list[str]] | None = None, trained_length: int = 0
) -> tuple[list[str], dict[str, Any]]:
    """Link or write all files except the manifest; returns their names, and facts for the manifest.

    `weights` writes new weights into `out` and returns the names of their files; `trained_length` is the length of the
    longest row they were trained on. Raises InputError if writing fails.
    """
    source = job.checkpoint.path
    linked = [name for name in _source_files(source) if name not in ("config.json", CARD)]
    if weights is not None:
        linked = [name for name in linked if ".safetensors" not in name]
    for name in linked:
        link_file(source / name, out / name)
    if weights is not None:
        linked = sorted([*linked, *weights()])
    write_json(out / "config.json", with_rope(read_model_config(source), job.rope, job.context))
    (out / CARD).unlink(missing_ok=True)
    scaling, original = job.scaling, job.scaling.original
    method = f"{scaling.method} ({scaling.ramp})" if scaling.method == "mrope++" else scaling.method
    trained = "trained at these positions" if "training" in job.provenance.config else "unchanged"
    title = f"{method}, {scaling.factor:g} x {original:,} = {job.context:,} tokens; weights {trained}."
    written = ["config.json", CARD, *write_side_files(out, title)]
    facts = {"context": job.context, "original_length": original, "trained_length": max(original, trained_length)}
    return [*linked, *written], facts


def clear(out: Path) -> None:
    """Remove files of an earlier run: its weights may be links to a model, which must not be overwritten."""
    if (out / MANIFEST).is_file():
        names = listed_files(out)
        (out / MANIFEST).unlink()
        for name in names:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / SGLANG, ignore_errors=True)


def _source_files(source: Path) -> list[str]:
    """Names of a model directory's files; its manifest and training log are left out."""
    names = (p.name for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(name for name in names if name not in (MANIFEST, "metrics.jsonl", *SIDE_FILES))
