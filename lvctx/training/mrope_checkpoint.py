"""Extend a Qwen-VL checkpoint by changing only its config.json; weights are linked, not rewritten (GIRAFFE 3.2).

The authors' released code replaces a class that Qwen2-VL does not use. Here M-RoPE++ is expressed with rope_parameters
of stock transformers, so any program that loads the checkpoint computes it; programs that read them differently
get side files (`models/side_files.py`).
"""

import math
import shutil
from collections.abc import Callable, Mapping
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
from lvctx.rope.scaling import ScaledRope, Scheme, rope_number
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
    base: float
    """The base of config.json: a larger one if it is scaled by ntk."""
    scaling: RopeScaling | None
    """The scaling of a checkpoint written by this project; None otherwise."""
    scaling_text: str
    """Description of its scaling; empty for a plain checkpoint."""
    length: int | None
    """Pretrained length in tokens, if the configuration determines it."""
    context: int
    """`max_position_embeddings` of config.json."""

    def require_length(self) -> int:
        """The pretrained length. Raises InputError if the configuration does not determine it."""
        if self.length is None:
            raise InputError(
                f"config.json does not state the pretrained length (it allows {self.context} positions)",
                where=self.path,
                fix=f"give --original-length ({RELEASED} for the released Qwen2.5-VL)",
            )
        return self.length


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
    base = rope_number(rope, "rope_theta", above=1.0)
    theta = ours["theta"] if ours else base
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
        base=base,
        scaling=scaling,
        scaling_text=words,
        length=length,
        context=text.max_position_embeddings,
    )


def find_mrope(config: Any, path: Path) -> Checkpoint | None:
    """The positions of a Qwen-VL; None for a model with one-dimensional RoPE. Raises InputError for other M-RoPE."""
    if config.model_type in MODEL_TYPES:
        return read_checkpoint(path)
    if "mrope_section" in (config.get_text_config().rope_parameters or {}):
        fix = f"give one of {', '.join(MODEL_TYPES)}"
        raise InputError(f"the positions of {config.model_type} have three axes (M-RoPE)", where=path, fix=fix)
    return None


def scaling_record(
    checkpoint: Checkpoint, new: ScaledRope, *, scheme: Scheme, theta: float | None
) -> dict[str, Any] | None:
    """The new scaling and the base before it, as a manifest stores them for later runs; None without scaling.

    `theta` replaces the base of config.json.
    """
    if scheme == "none" and checkpoint.scaling is not None:
        return {**asdict(checkpoint.scaling), "theta": checkpoint.mrope.theta}
    if scheme == "none" or scheme == "theta":
        return None
    assert new.original is not None
    scaling = RopeScaling(method=scheme, ramp="index", factor=new.factor, original=new.original)
    return {**asdict(scaling), "theta": theta or checkpoint.base}


def record_title(record: Mapping[str, Any] | None, context: int, *, is_trained: bool) -> str | None:
    """The sentence of the model card about a `scaling_record`; None where another context was chosen, or no scaling."""
    scaling = RopeScaling(**{key: value for key, value in record.items() if key != "theta"}) if record else None
    if scaling is None or round(scaling.factor * scaling.original) != context:
        return None
    return describe_scaling(scaling, context, is_trained=is_trained)


def _made_by_us(path: Path) -> dict[str, Any] | None:
    """The scaling and the unscaled base, as our run that wrote this checkpoint stored them; None for others."""
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else {}
    scaled: dict[str, Any] | None = manifest.get("rope_scaling")  # of `extend-lm`
    return manifest["config"] if manifest.get("command") == COMMAND else scaled


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
    # A training may continue one of ours at another scale, whose pretrained length and base its manifest has.
    continues = config.data is not None and checkpoint.scaling is not None
    if checkpoint.scaling_text and not force and not continues:
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
    length = config.original_length or checkpoint.require_length()
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
    original, is_trained = job.scaling.original, "training" in job.provenance.config
    title = describe_scaling(job.scaling, job.context, is_trained=is_trained)
    written = ["config.json", CARD, *write_side_files(out, title)]
    before = read_manifest(source).get("trained_length", 0) if (source / MANIFEST).is_file() else 0
    facts = {
        "context": job.context,
        "original_length": original,
        "trained_length": max(original, trained_length, before),
    }
    return [*linked, *written], facts


def describe_scaling(scaling: RopeScaling, context: int, *, is_trained: bool) -> str:
    """The scaling as a sentence for the model card."""
    method = f"{scaling.method} ({scaling.ramp})" if scaling.method == "mrope++" else scaling.method
    trained = "trained at these positions" if is_trained else "unchanged"
    return f"{method}, {scaling.factor:g} x {scaling.original:,} = {context:,} tokens; weights {trained}."


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
