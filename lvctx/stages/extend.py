"""Extend a language model's context on text alone: raise the RoPE base, then train on long packed rows.

LongVA section 3.1 (Qwen2-7B-Instruct: base 1e9, 224K tokens, 1000 steps of about 1M tokens, lr 1e-5 constant).
The result is a plain Hugging Face directory whose config.json says the new base and the new length.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import MANIFEST, Provenance, is_finished, write_manifest
from lvctx.artifacts.packed import PackedRows
from lvctx.artifacts.store import fingerprint
from lvctx.dist import checkpoint
from lvctx.errors import InputError, UsageError
from lvctx.model.export import model_files, save_model
from lvctx.model.load import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    trained_length,
)
from lvctx.model.lora import ATTENTION, add_lora, lora_parameters, merge_lora
from lvctx.model.loss import shift_labels, token_loss
from lvctx.positions.choose import Scheme, choose
from lvctx.train.data import indices
from lvctx.train.loop import Group, TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """What decides an extended model, besides model and data."""

    rope: Scheme
    """Position scheme: `theta` a new base, `pi`, `ntk` and `yarn` stretch, `none` keeps the model's."""
    rope_theta: float
    """RoPE base; LongVA 1e9. With `ntk` the one that `rope_factor` stretches became."""
    rope_factor: float
    """Times the pretrained length; 1 for `theta` and `none`."""
    context: int
    """Positions the new config.json promises, in tokens."""
    seq_len: int
    """Tokens of a training row: the packed rows' own length."""
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
    rope_parameters: dict[str, Any]
    """Of the new config.json."""
    original_context: int
    """Positions the model says it can read before."""
    provenance: Provenance
    """What identifies the run."""


def plan_extend(
    *,
    model: str,
    data: Path | None,
    rope: Scheme,
    rope_theta: float | None,
    factor: float | None,
    context: int | None,
    steps: int,
    batch_tokens: int,
    lr: float,
    lora: int,
    checkpoint_activations: bool,
    seed: int,
) -> Plan:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError; loads no weights."""
    path = resolve_model(model)
    hf = load_config(path)
    rows = None
    if steps > 0:
        if data is None:
            raise UsageError("--data is needed to train", fix="give packed rows, or --steps 0 to change the base only")
        rows = PackedRows(data)
        _check_rows(rows, path, data)
    seq_len = rows.seq_len if rows else 0
    positions = choose(hf, scheme=rope, theta=rope_theta, factor=factor, context=context, seq_len=seq_len)
    if positions.context < seq_len:
        raise UsageError(
            f"rows of {seq_len} are longer than the {positions.context} positions", fix="raise --context or --factor"
        )
    config = ExtendConfig(
        rope=rope,
        rope_theta=positions.rope_parameters["rope_theta"],
        rope_factor=positions.factor,
        context=positions.context,
        seq_len=seq_len,
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        lora=lora,
        checkpoint_activations=checkpoint_activations,
        seed=seed,
    )
    if rows and batch_tokens < seq_len:
        raise UsageError(f"--batch-tokens {batch_tokens} is less than one row of {seq_len}", fix="raise it")
    inputs = {"model": fingerprint(path)} | ({"data": fingerprint(data)} if data and rows else {})
    provenance = Provenance(schema=schemas.MODEL, command="extend-lm", config=asdict(config), inputs=inputs, seed=seed)
    return Plan(
        model=path,
        config=config,
        data=rows,
        rope_parameters=positions.rope_parameters,
        original_context=context_length(hf),
        provenance=provenance,
    )


def _check_rows(rows: PackedRows, model: Path, data: Path) -> None:
    tokenizer = model / "tokenizer.json"
    packed_with = rows.manifest["inputs"].get("tokenizer")
    if tokenizer.is_file() and packed_with and packed_with != fingerprint(tokenizer):
        raise InputError(
            "rows were packed with another tokenizer", where=data, fix=f"pack-text --tokenizer {model} again"
        )


def run_extend(
    plan: Plan, out: Path, *, resume: str, force: bool, device: str, report: Callable[[int, int, str], None]
) -> None:
    """Train (or resume) and write the extended model to `out`; nothing to do if it stands finished."""
    if is_finished(out, plan.provenance, resume=resume, force=force):
        return
    if force or resume == "never":
        checkpoint.remove(out)
        (out / MANIFEST).unlink(missing_ok=True)
    config = plan.config
    hf = load_config(plan.model)
    dtype = hf.dtype or torch.bfloat16
    hf.rope_parameters = plan.rope_parameters
    hf.max_position_embeddings = config.context
    full = config.steps > 0 and config.lora == 0
    model = load_model(plan.model, config=hf, dtype=torch.float32 if full else dtype, device=device)
    tokenizer = load_tokenizer(plan.model)
    if plan.data is not None:
        model = _train(model, plan, plan.data, out, device=device, report=report)
    out.mkdir(parents=True, exist_ok=True)
    save_model(model.to(dtype), tokenizer, out)
    longest = max(trained_length(plan.model), config.seq_len)
    facts = {"original_context": plan.original_context, "context": config.context, "trained_length": longest}
    write_manifest(out, plan.provenance, model_files(out), **facts)
    checkpoint.remove(out)


def _train(
    model: Any, plan: Plan, rows: PackedRows, out: Path, *, device: str, report: Callable[[int, int, str], None]
) -> Any:
    config = plan.config
    if config.lora:
        model = add_lora(model, rank=config.lora, targets=ATTENTION, seed=config.seed)
    lm = model.get_base_model() if config.lora else model
    if config.checkpoint_activations:
        # Renamed in transformers 5.2x; both recompute layer by layer without reentrance.
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        lm.train()
    parameters = lora_parameters(model)
    rows_a_step = config.batch_tokens // config.seq_len

    def batch(step: int) -> Sequence[int]:
        return indices(step, batch=rows_a_step, samples=len(rows), seed=config.seed)

    def loss(row: int) -> tuple[Tensor, int]:
        ids = torch.from_numpy(rows.row(row).astype("int64"))[None].to(device)
        hidden = lm.model(input_ids=ids, use_cache=False).last_hidden_state
        return token_loss(hidden[0], lm.lm_head.weight, shift_labels(ids)[0])

    train(
        groups=[Group(name="lm", parameters=parameters, lr=config.lr)],
        batch=batch,
        loss=loss,
        config=TrainConfig(steps=config.steps, schedule="constant", warmup=0.0, weight_decay=0.1),
        out=out,
        run=plan.provenance.config_hash,
        report=report,
        device=device,
    )
    return merge_lora(model).eval() if config.lora else model.eval()
