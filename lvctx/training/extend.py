"""Extend a language model's context on text only: raise the RoPE base, then train on long packed rows.

LongVA section 3.1 (Qwen2-7B-Instruct: base 1e9, 224K tokens, 1000 steps of about 1M tokens, lr 1e-5 constant). The
result is a plain Hugging Face directory whose config.json has the new base and the new length.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import MANIFEST, Provenance, read_manifest
from lvctx.artifacts.store import fingerprint
from lvctx.config import hashed_fields
from lvctx.data.packed import PackedRows, check_shards
from lvctx.errors import InputError, UsageError
from lvctx.models.adapter import load_adapter, longest_sample
from lvctx.models.loading import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    read_config,
    refuse_quantized,
    resolve_model,
    trained_length,
    try_forward,
)
from lvctx.models.lora import ATTENTION, Gather, add_lora
from lvctx.models.saving import copy_processors, model_files, save_model
from lvctx.models.side_files import write_side_files
from lvctx.parallel import hf_attention
from lvctx.parallel.context import ParallelContext
from lvctx.rope.pose import skipped
from lvctx.rope.scaling import check_rope, full_attention_rope, resolve_scaling
from lvctx.training.decoder_shape import PLANNED_TYPES, read_shape
from lvctx.training.extend_config import ExtendConfig
from lvctx.training.memory_model import Recomputation, flops, rows_together
from lvctx.training.mrope_checkpoint import find_mrope, record_title, scaling_record
from lvctx.training.parallel_config import ParallelConfig
from lvctx.training.plan import predict_extend
from lvctx.training.row_order import indices
from lvctx.training.task import ParameterGroup, TrainableModel, TrainConfig, TrainingTask
from lvctx.training.text_rows import RowLoss, shard_row

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtendJob:
    """A checked run: its inputs and outputs."""

    model: Path
    """Resolved model directory."""
    config: ExtendConfig
    """The configuration with every default resolved; `seq_len` is 0 without training."""
    data: PackedRows | None
    """Packed rows; None without training."""
    rope_parameters: dict[str, Any]
    """Positions of the new config.json."""
    original_context: int
    """Context length in the model's config.json."""
    provenance: Provenance
    """What identifies the run."""
    mrope: Mapping[str, Any] | None = None
    """Scaling and unscaled base of a Qwen-VL, for its manifest; None for other models, and for an unscaled one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts for the manifest: the search for the base."""

    @property
    def rows_per_step(self) -> int:
        """Number of whole rows in `batch_tokens`."""
        return self.config.batch_tokens // (self.config.seq_len or 1) if self.data else 0

    @property
    def epochs(self) -> float:
        """Number of passes over the rows."""
        return self.config.steps * self.rows_per_step / len(self.data) if self.data else 0.0

    def task(self) -> "ExtendTask":
        """The training."""
        return ExtendTask(self)

    def as_final_stage(self, first: Self, provenance: Provenance) -> Self:
        """This job as the last of several stages that began with `first`, under the provenance of the whole run."""
        return replace(self, provenance=provenance, original_context=first.original_context)


def resolve_extend(config: ExtendConfig) -> ExtendJob:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError; loads no weights."""
    if config.adapter and not config.lora:
        raise UsageError("--adapter is a LoRA and needs --lora")
    path = resolve_model(config.model)
    model_config = load_config(path)
    refuse_quantized(model_config, path)
    text = model_config.get_text_config()
    checkpoint = find_mrope(model_config, path)
    rows = _open_rows(config, path) if config.steps else None
    if rows:
        check_shards(rows.directory, len(rows.manifest["shard_rows"]), text.vocab_size)
    length = rows.seq_len if rows else 0
    if config.rope == "none":
        check_rope(text, path)
    original = config.original_length
    if config.rope not in ("theta", "none"):
        original = _pretrained_length(path, text, original)
        if checkpoint and original is None:
            checkpoint.require_length()
    positions = resolve_scaling(
        text,
        scheme=config.rope,
        theta=config.rope_theta,
        factor=config.factor,
        context=config.context,
        seq_len=length,
        attention_factor=config.attention_factor,
        original=original,
    )
    if positions.context < length:
        raise UsageError(
            f"rows of {length} are longer than the {positions.context} positions", fix="raise --context or --factor"
        )
    if config.pose and "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise InputError("--pose: its sliding windows count tokens, not positions", where=path, fix="drop --pose")
    if config.pose and positions.context <= length:
        raise UsageError(f"--pose: {positions.context} positions for rows of {length}", fix="raise --context")
    if rows:
        _check_batch(config, rows)
    resolved = replace(
        config,
        rope_theta=full_attention_rope(positions.rope_parameters)["rope_theta"],
        factor=positions.factor,
        original_length=positions.original,
        context=positions.context,
        seq_len=length,
    )
    inputs = {"model": path, "data": config.data if rows else None, "adapter": config.adapter}
    provenance = Provenance(
        schema=schemas.MODEL,
        command="extend-lm",
        config=hashed_fields(resolved),
        inputs={role: fingerprint(source) for role, source in inputs.items() if source},
        seed=config.seed,
    )
    return ExtendJob(
        model=path,
        config=resolved,
        data=rows,
        rope_parameters=positions.rope_parameters,
        original_context=context_length(text),
        provenance=provenance,
        mrope=scaling_record(checkpoint, positions, scheme=config.rope, theta=config.rope_theta)
        if checkpoint
        else None,
    )


def _pretrained_length(model: Path, config: Any, original_length: int | None) -> int | None:
    """The pretrained length if config.json does not have it: given by the user, or recorded by an earlier scaling.

    After a scaling by a larger base (ntk) the next one starts from its context. Raises UsageError if the two differ.
    """
    recorded = _recorded_length(model)
    if recorded is None:
        return original_length
    if original_length not in (None, recorded):
        raise UsageError(f"--original-length {original_length}, but {model / MANIFEST} has {recorded}", fix="drop it")
    linear = full_attention_rope(config.rope_parameters or {}).get("rope_type") == "linear"
    return recorded if linear else None


def _recorded_length(model: Path) -> int | None:
    """The pretrained length in the manifest of a model that one of our runs scaled."""
    recorded = read_manifest(model).get("original_length") if (model / MANIFEST).is_file() else None
    return recorded if isinstance(recorded, int) else None


def _open_rows(config: ExtendConfig, model: Path) -> PackedRows:
    if config.data is None:
        raise UsageError("--data is needed to train", fix="give packed rows, or --steps 0 to change the base only")
    rows = PackedRows(config.data, seq_len=config.seq_len)
    tokenizer = model / "tokenizer.json"
    packed_with = rows.manifest["inputs"].get("tokenizer")
    if tokenizer.is_file() and packed_with and packed_with != fingerprint(tokenizer):
        raise InputError(
            "rows were packed with another tokenizer", where=config.data, fix=f"pack-text with --tokenizer {model}"
        )
    return rows


def _check_batch(config: ExtendConfig, rows: PackedRows) -> None:
    if config.batch_tokens < rows.seq_len:
        raise UsageError(f"--batch-tokens {config.batch_tokens} is less than one row of {rows.seq_len}", fix="raise it")
    if len(rows) < config.batch_tokens // rows.seq_len:
        raise InputError(
            f"{len(rows)} rows of {rows.seq_len} tokens do not make a step of {config.batch_tokens}",
            where=config.data,
            fix="pack more text, or lower --batch-tokens",
        )


class ExtendTask(TrainingTask[Sequence[tuple[int, int]]]):
    """Next-token prediction on packed rows; a micro-batch is a list of rows, each with its epoch."""

    equal_lengths = True

    def __init__(self, job: ExtendJob) -> None:
        self.job, self.provenance = job, job.provenance
        self.inputs = [job.model, *([job.data.directory] if job.data else [])]
        self.datasets = job.data.manifest.get("datasets", ()) if job.data else ()
        steps = job.config.steps if job.data else 0
        self.train_config = TrainConfig(steps=steps, schedule="constant", warmup=0.0, weight_decay=0.1)
        self.flops = _flops(job)

    def load(self, device: str) -> TrainableModel:
        """The model with its new positions. Only the language model of a VLM is trainable."""
        job, config = self.job, self.job.config
        model_config = load_config(job.model)
        text = model_config.get_text_config()
        text.rope_parameters, text.max_position_embeddings = job.rope_parameters, config.context
        dtype = model_config.dtype or torch.bfloat16
        model = load_model(job.model, config=model_config, dtype=dtype, device=device).requires_grad_(False)
        try_forward(model, job.model)
        decoder, lora = model.get_decoder(), None
        if not config.lora:
            decoder.requires_grad_(True)
            model.get_output_embeddings().requires_grad_(True)
        elif job.data or config.adapter:
            lora = add_lora(decoder, rank=config.lora, targets=ATTENTION, seed=config.seed)
        if config.adapter:
            load_adapter(config.adapter, model, lora)
        groups = [ParameterGroup(name="lm", modules=[model], lr=config.lr)]
        return TrainableModel(model=model, groups=groups, decoder=decoder, lora=lora)

    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> nn.Module:
        """The language model with its loss."""
        job, config = self.job, self.job.config
        if job.rows_per_step < context.dp:
            rows = f"--batch-tokens {config.batch_tokens} is {job.rows_per_step} rows"
            raise UsageError(f"{rows} for {context.dp} data-parallel groups", fix="raise it or --cp")
        if job.epochs > 1:
            few = "%d rows for %d steps: each row is used %.1f times"
            log.warning(few, len(self.rows), config.steps, job.epochs)
        text = trainable.decoder.config
        # Stock SDPA would need a mask of length times length for sliding windows, which `plan` does not count.
        has_windows = "sliding_attention" in (getattr(text, "layer_types", None) or ())
        if context.cp > 1 or config.doc_mask or (has_windows and text.model_type in PLANNED_TYPES):
            hf_attention.use(trainable.decoder, where=job.model, ring=context.ring)
        self.rows_per_forward = self._rows_of_a_forward(context, parallel)
        self.context, self.row_loss = context, RowLoss(trainable.model)
        return self.row_loss

    def _rows_of_a_forward(self, context: ParallelContext, parallel: ParallelConfig) -> int:
        """As `plan` predicts for the smallest device."""
        if self.job.config.doc_mask:
            return 1
        if predicted := predict_extend(self.job, parallel, world=context.size):
            return int(min(context.gather(predicted["rows_a_forward"])))
        return rows_together(self.rows.seq_len, parallel.forward_tokens, -(-self.job.rows_per_step // context.dp))

    def recomputation(self, context: ParallelContext, parallel: ParallelConfig) -> Recomputation:
        """The least for which the memory of the smallest device is predicted to suffice."""
        predicted = predict_extend(self.job, parallel, world=context.size)
        found = Recomputation(**predicted["recomputation"]) if predicted else Recomputation()
        return min(context.gather(found), key=lambda r: (r.kept_layers, not r.mlp_tiles))

    @property
    def rows(self) -> PackedRows:
        """The rows trained on."""
        assert self.job.data is not None
        return self.job.data

    def batches(self, step: int) -> Sequence[Sequence[tuple[int, int]]]:
        """Rows of a step, grouped by forward."""
        per_step, count = self.job.rows_per_step, len(self.rows)
        drawn = indices(step, batch=per_step, samples=count, seed=self.job.config.seed)
        row_epochs = [(row, (step * per_step + n) // count) for n, row in enumerate(drawn)]
        return [
            row_epochs[first : first + self.rows_per_forward]
            for first in range(0, len(row_epochs), self.rows_per_forward)
        ]

    def loss(self, micro: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
        """Cross-entropy of every next token."""
        config, rows = self.job.config, self.rows
        ids_BL = torch.from_numpy(np.stack([rows.row(row) for row, _ in micro]).astype("int64"))
        starts = hf_attention.document_starts(rows.doc_starts(micro[0][0]).tolist()) if config.doc_mask else None
        positions_BL = None
        if config.pose:
            assert config.context is not None
            rngs = [np.random.default_rng([config.seed, epoch, row]) for row, epoch in micro]
            positions_BL = torch.from_numpy(np.stack([skipped(rows.seq_len, config.context, rng) for rng in rngs]))
        total, count = self.row_loss(**shard_row(ids_BL, self.context, starts, positions_BL))
        return total, count

    def describe(self, micro: Sequence[tuple[int, int]]) -> str:
        """Numbers of the rows."""
        return ", ".join(f"row {row}" for row, _ in micro)

    def longest_sample(self, metrics: Sequence[dict[str, Any]]) -> int:
        """Tokens of the longest row trained on, in this run or in the one whose LoRA it starts from."""
        adapter = self.job.config.adapter
        return max(self.job.config.seq_len or 0, longest_sample(adapter) if adapter else 0)

    def save(
        self, model: Any, out: Path, metrics: Sequence[dict[str, Any]], gather: Gather
    ) -> tuple[list[str], dict[str, Any]]:
        """Write the model, its tokenizer, and side files for other runtimes."""
        job = self.job
        dtype = load_config(job.model).dtype or torch.bfloat16
        save_model(model, load_tokenizer(job.model), out, dtype=dtype, gather=gather)
        copy_processors(job.model, out)
        title = record_title(job.mrope, context_length(model.config), is_trained=job.data is not None)
        write_side_files(out, title)
        facts: dict[str, Any] = {
            "original_context": job.original_context,
            "context": job.config.context,
            "trained_length": max(trained_length(job.model), self.longest_sample(metrics)),
            **({} if job.mrope is None else {"rope_scaling": job.mrope}),
        }
        kept = _recorded_length(job.model) if job.config.rope == "none" else None
        if (original := job.config.original_length or kept) is not None:
            facts["original_length"] = original
        if aligned := longest_sample(job.model):
            facts["longest_sample"] = aligned
        return model_files(out), {**facts, **job.facts}


def _flops(job: ExtendJob) -> float | None:
    """Operations of a step; None for an unsupported model, and without training."""
    raw = read_config(job.model)
    if raw.get("model_type") not in PLANNED_TYPES or job.data is None:
        return None
    shape, length = read_shape(raw, where=job.model), job.data.seq_len
    return flops(shape, length, job.rows_per_step * length, lora=bool(job.config.lora))
