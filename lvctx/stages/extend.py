"""Extend a language model's context on text alone: raise the RoPE base, then train on long packed rows.

LongVA section 3.1 (Qwen2-7B-Instruct: base 1e9, 224K tokens, 1000 steps of about 1M tokens, lr 1e-5 constant).
The result is a plain Hugging Face directory whose config.json says the new base and the new length.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvctx.artifacts import schemas
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import MANIFEST, Provenance, is_finished, read_manifest, write_manifest
from lvctx.artifacts.packed import PackedRows
from lvctx.artifacts.store import fingerprint
from lvctx.dist import attention, checkpoint
from lvctx.dist.context import ParallelContext, open_context
from lvctx.dist.fsdp import gather_into, shard_model
from lvctx.dist.kernels import cudnn_first
from lvctx.errors import InputError, UsageError
from lvctx.model.adapter import load_adapter, longest_sample, save_adapter
from lvctx.model.export import copy_processors, model_files, save_model
from lvctx.model.load import (
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
from lvctx.model.lora import ATTENTION, add_lora, lora_parameters, merge_lora
from lvctx.positions.choose import Scheme, check_rope, choose
from lvctx.positions.pose import skipped
from lvctx.stages.side_files import write_side_files
from lvctx.train.activations import checkpoint_layers
from lvctx.train.data import indices
from lvctx.train.loop import Group, TrainConfig, train
from lvctx.train.plan import KINDS, flops, read_shape, rows_together
from lvctx.train.rows import RowLoss, shard_row

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """What decides an extended model, besides model and data."""

    rope: Scheme
    """Position scheme: `theta` a new base, `pi`, `ntk` and `yarn` stretch, `none` keeps the model's."""
    rope_theta: float
    """RoPE base; LongVA 1e9. With `ntk` the one that `rope_factor` stretches became."""
    rope_factor: float
    """Times the pretrained length; 1 for `theta` and `none`."""
    attention_factor: float | None
    """What `yarn` multiplies cos and sin by; None: its paper's 0.1 ln(factor) + 1."""
    context: int
    """Positions the new config.json promises, in tokens."""
    seq_len: int
    """Tokens of a training row: the packed rows' own length, or that of the pieces they are cut into."""
    steps: int
    """Optimizer steps; 0 changes the positions only."""
    batch_tokens: int
    """Tokens a step, rounded down to whole rows; LongVA about 1M."""
    lr: float
    """Peak learning rate; LongVA 1e-5."""
    lora: int
    """Rank of LoRA on the attention projections; 0 trains all parameters, as LongVA."""
    checkpoint_activations: bool
    """Recompute each layer in the backward pass instead of keeping its activations."""
    doc_mask: bool
    """Tokens attend in their own document only; LongVA lets them see the whole row."""
    pose: bool
    """Rows are cut in two and spread over the whole context (PoSE); LongVA trains at full length."""
    seed: int
    """Order of the rows and LoRA's initialisation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: what will be read and written."""

    model: Path
    """Resolved model directory."""
    config: ExtendConfig
    """With every default resolved."""
    data: PackedRows | None
    """Packed rows; None when there is nothing to train."""
    adapter: Path | None
    """A LoRA to start from."""
    rope_parameters: dict[str, Any]
    """Of the new config.json."""
    original_context: int
    """Positions the model says it can read before."""
    original_length: int | None
    """Pretrained length that `config.rope_factor` counts from; None where nothing is stretched."""
    provenance: Provenance
    """What identifies the run."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """What else the manifest says: how a search found the base."""

    @property
    def rows_a_step(self) -> int:
        """Whole rows of `batch_tokens`."""
        return self.config.batch_tokens // self.config.seq_len if self.data else 0

    @property
    def epochs(self) -> float:
        """Times that training reads the rows."""
        return self.config.steps * self.rows_a_step / len(self.data) if self.data else 0.0


def plan_extend(
    *,
    model: str,
    data: Path | None,
    rope: Scheme,
    rope_theta: float | None,
    factor: float | None,
    attention_factor: float | None,
    context: int | None,
    original_length: int | None = None,
    seq_len: int | None,
    steps: int,
    batch_tokens: int,
    lr: float,
    lora: int,
    adapter: Path | None,
    checkpoint_activations: bool,
    doc_mask: bool,
    pose: bool,
    seed: int,
) -> Plan:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError; loads no weights."""
    if adapter and not lora:
        raise UsageError("--adapter holds a LoRA: it goes with --lora")
    path = resolve_model(model)
    whole = load_config(path)
    refuse_quantized(whole, path)
    hf = whole.get_text_config()
    if "mrope_section" in (hf.rope_parameters or {}):
        raise InputError("positions have three axes (M-RoPE)", where=path, fix="lvctx mrope-extend")
    rows = None
    if steps > 0:
        if data is None:
            raise UsageError("--data is needed to train", fix="give packed rows, or --steps 0 to change the base only")
        rows = PackedRows(data, seq_len=seq_len)
        _check_rows(rows, path, data)
    length = rows.seq_len if rows else 0
    if rope == "none":
        check_rope(hf, path)
    positions = choose(
        hf,
        scheme=rope,
        theta=rope_theta,
        factor=factor,
        context=context,
        seq_len=length,
        attention_factor=attention_factor,
        original=_original(path, hf, original_length),
    )
    if positions.context < length:
        raise UsageError(
            f"rows of {length} are longer than the {positions.context} positions", fix="raise --context or --factor"
        )
    config = ExtendConfig(
        rope=rope,
        rope_theta=positions.rope_parameters["rope_theta"],
        rope_factor=positions.factor,
        attention_factor=attention_factor,
        context=positions.context,
        seq_len=length,
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        lora=lora,
        checkpoint_activations=checkpoint_activations,
        doc_mask=doc_mask,
        pose=pose,
        seed=seed,
    )
    if pose and positions.context <= length:
        raise UsageError(f"--pose spreads rows of {length} over {positions.context} positions", fix="raise --context")
    if rows and batch_tokens < length:
        raise UsageError(f"--batch-tokens {batch_tokens} is less than one row of {length}", fix="raise it")
    if rows and len(rows) < batch_tokens // length:
        raise InputError(
            f"{len(rows)} rows of {length} tokens do not make a step of {batch_tokens}",
            where=data,
            fix="pack more text, or lower --batch-tokens",
        )
    inputs = {"model": fingerprint(path)} | ({"data": fingerprint(data)} if data and rows else {})
    inputs |= {"adapter": fingerprint(adapter)} if adapter else {}
    provenance = Provenance(schema=schemas.MODEL, command="extend-lm", config=asdict(config), inputs=inputs, seed=seed)
    return Plan(
        model=path,
        config=config,
        data=rows,
        adapter=adapter,
        rope_parameters=positions.rope_parameters,
        original_context=context_length(hf),
        original_length=positions.original,
        provenance=provenance,
    )


def _original(model: Path, config: Any, asked: int | None) -> int | None:
    """The pretrained length where config.json does not say it: as `asked`, or as an earlier stretch of ours recorded.

    Of a stretch that is a larger base (ntk) the next one starts from what that reaches. Raises UsageError where the
    two differ.
    """
    recorded = read_manifest(model).get("original_length") if (model / MANIFEST).is_file() else None
    if not isinstance(recorded, int):
        return asked
    if asked not in (None, recorded):
        raise UsageError(f"--original-length {asked}, but {model / MANIFEST} has {recorded}", fix="drop it")
    linear = (config.rope_parameters or {}).get("rope_type") == "linear"
    return recorded if linear else None


def _check_rows(rows: PackedRows, model: Path, data: Path) -> None:
    tokenizer = model / "tokenizer.json"
    packed_with = rows.manifest["inputs"].get("tokenizer")
    if tokenizer.is_file() and packed_with and packed_with != fingerprint(tokenizer):
        raise InputError(
            "rows were packed with another tokenizer", where=data, fix=f"pack-text --tokenizer {model} again"
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How a run is spread and where it keeps things: no part of what it makes."""

    device: str
    """Where to train: cpu, cuda."""
    cp: int = 1
    """Ranks that share a row."""
    offload: bool = False
    """Keep parameters and optimizer state in host memory."""
    offload_activations: bool = False
    """Keep the layers' inputs in host memory between forward and backward."""
    micro_tokens: int = 1
    """Tokens of one forward, in whole rows and at least one; with `doc_mask` one row."""


def run_extend(
    plan: Plan, out: Path, *, resume: str, force: bool, machine: Machine, report: Callable[[int, int, str], None]
) -> None:
    """Train (or resume) and write the extended model to `out`; nothing to do if it stands finished.

    Under torchrun every rank calls it, and rank 0 writes.
    """
    if is_finished(out, plan.provenance, resume=resume, force=force):
        return
    with open_context(device=machine.device, cp=machine.cp, sharded=machine.offload) as world, ExitStack() as held:
        if world.rank == 0:
            held.enter_context(only_writer(out))
            if force or resume == "never":
                checkpoint.remove(out)
                (out / MANIFEST).unlink(missing_ok=True)
        world.barrier()
        model = _train(plan, out, machine, world, report)
        if world.rank == 0:
            save_model(model.to(_dtype(plan)), load_tokenizer(plan.model), out)
            copy_processors(plan.model, out)
            write_side_files(out)
            facts = {
                "original_context": plan.original_context,
                "context": plan.config.context,
                "trained_length": max(trained_length(plan.model), _longest_row(plan)),
            }
            if plan.original_length is not None:
                facts["original_length"] = plan.original_length
            if aligned := longest_sample(plan.model):
                facts["longest_sample"] = aligned
            write_manifest(out, plan.provenance, model_files(out), **facts, **plan.found)
            checkpoint.remove(out)
        world.barrier()


def _longest_row(plan: Plan) -> int:
    """Tokens of the longest row trained on, in this run or in the one that its LoRA goes on from."""
    return max(plan.config.seq_len, longest_sample(plan.adapter) if plan.adapter else 0)


def _dtype(plan: Plan) -> torch.dtype:
    return load_config(plan.model).dtype or torch.bfloat16


def _load(plan: Plan, device: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model with its new positions, in its own dtype or another, and its LoRA wrapper if any.

    Of a VLM only the language model can train.
    """
    hf, config = load_config(plan.model), plan.config
    text = hf.get_text_config()
    text.rope_parameters, text.max_position_embeddings = plan.rope_parameters, config.context
    model = load_model(plan.model, config=hf, dtype=dtype or _dtype(plan), device=device).requires_grad_(False)
    try_forward(model, plan.model)
    decoder = model.get_decoder()
    if not config.lora:
        decoder.requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    if not config.lora or not (plan.data or plan.adapter):
        return model, None
    wrapped = add_lora(decoder, rank=config.lora, targets=ATTENTION, seed=config.seed)
    if plan.adapter:
        load_adapter(plan.adapter, model, wrapped)
    return model, wrapped


def _train(
    plan: Plan, out: Path, machine: Machine, world: ParallelContext, report: Callable[[int, int, str], None]
) -> Any:
    """The model to save, trained if there are rows; on ranks other than 0, None."""
    config, rows = plan.config, plan.data
    # Sharding makes float32 of what it keeps; before it, each rank holds the model in its own dtype.
    dtype = torch.float32 if rows and world.mesh is None and not config.lora else None
    model, wrapped = _load(plan, "cpu" if world.mesh is not None else world.device, dtype)
    if rows:
        _run_steps(plan, rows, model, out, machine, world, report)
        if world.mesh is not None:
            twin, wrapped = _load(plan, "cpu") if world.rank == 0 else (None, None)
            gather_into(twin, model)
            model = twin
    if wrapped is not None and world.rank == 0:
        save_adapter(out, model, wrapped, plan.provenance, longest=_longest_row(plan))
        merge_lora(wrapped)  # in place
    return model.eval() if model is not None else None


def _run_steps(
    plan: Plan,
    rows: PackedRows,
    model: Any,
    out: Path,
    machine: Machine,
    world: ParallelContext,
    report: Callable[[int, int, str], None],
) -> None:
    """Train `model` in place."""
    config, decoder = plan.config, model.get_decoder()
    if world.cp > 1 or config.doc_mask:
        attention.use(decoder, where=plan.model)
    if config.checkpoint_activations:
        checkpoint_layers(decoder, offload=machine.offload_activations)
    row_loss = RowLoss(model)
    shard_model(row_loss, decoder.layers, world, offload=machine.offload)
    if plan.rows_a_step < world.dp:
        raise UsageError(
            f"--batch-tokens {config.batch_tokens} is {plan.rows_a_step} rows for {world.dp} data-parallel groups",
            fix="raise it or --cp",
        )
    if plan.epochs > 1:
        log.warning("%d rows are few for %d steps: each is read %.1f times", len(rows), config.steps, plan.epochs)

    share = -(-plan.rows_a_step // world.dp)
    together = 1 if config.doc_mask else rows_together(config.seq_len, machine.micro_tokens, share)

    def batch(step: int) -> Sequence[Sequence[tuple[int, int]]]:
        """Rows of a step, each with the epoch that reads it, by forward."""
        drawn = indices(step, batch=plan.rows_a_step, samples=len(rows), seed=config.seed)
        read = [(row, (step * plan.rows_a_step + n) // len(rows)) for n, row in enumerate(drawn)]
        return [read[first : first + together] for first in range(0, len(read), together)]

    def loss(micro: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
        ids = torch.from_numpy(np.stack([rows.row(row) for row, _ in micro]).astype("int64"))
        starts = attention.document_starts(rows.doc_starts(micro[0][0]).tolist()) if config.doc_mask else None
        positions = None
        if config.pose:
            rngs = [np.random.default_rng([config.seed, epoch, row]) for row, epoch in micro]
            positions = torch.from_numpy(np.stack([skipped(config.seq_len, config.context, rng) for rng in rngs]))
        return row_loss(**shard_row(ids, world, starts, positions))

    with cudnn_first(world.device):  # all rows are of one length
        train(
            groups=[Group(name="lm", parameters=lora_parameters(model), lr=config.lr)],
            batch=batch,
            loss=loss,
            config=TrainConfig(steps=config.steps, schedule="constant", warmup=0.0, weight_decay=0.1),
            out=out,
            run=plan.provenance,
            report=report,
            world=world,
            name=lambda micro: ", ".join(f"row {row}" for row, _ in micro),
            flops=_flops(plan),
        )


def _flops(plan: Plan) -> float | None:
    """Operations of a step; None for a model that the arithmetic does not know."""
    raw, config = read_config(plan.model), plan.config
    if raw.get("model_type") not in KINDS:
        return None
    tokens = plan.rows_a_step * config.seq_len
    return flops(read_shape(raw, where=plan.model), config.seq_len, tokens, lora=bool(config.lora))
