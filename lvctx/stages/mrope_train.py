"""Train a stretched Qwen-VL model on long chat rows: its language model alone, by LoRA or whole (GIRAFFE, appendix E).

The tower, the merger behind it and with LoRA the embeddings are frozen. What is written is what `mrope-extend` writes
without training, except for the weights, and beside them the LoRA by itself.

Shapes: L tokens of a row, E width of the language model.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvctx.artifacts.chat import ChatRows
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import Provenance, is_finished
from lvctx.artifacts.store import fingerprint, scratch
from lvctx.dist import attention, checkpoint
from lvctx.dist.attention import Shard
from lvctx.dist.context import ParallelContext, open_context
from lvctx.dist.fsdp import gather_into, keep_in_graph, shard_model
from lvctx.dist.ring import Ring
from lvctx.dist.zigzag import shard
from lvctx.errors import InputError, UsageError
from lvctx.model.adapter import ADAPTER, save_adapter
from lvctx.model.load import load_config, load_image_processor, load_model, try_forward
from lvctx.model.lora import ATTENTION, add_lora, merge_lora
from lvctx.model.loss import IGNORED, token_loss
from lvctx.positions.mrope import Method
from lvctx.positions.mrope_ids import Rules
from lvctx.positions.mrope_pp import Ramp
from lvctx.stages.extend import Machine
from lvctx.stages.mrope import Plan, clear, plan_mrope, write_checkpoint
from lvctx.stages.pack_chat import plan_pack_chat, run_pack_chat
from lvctx.stages.pack_chat_config import PackChatConfig
from lvctx.train.activations import checkpoint_layers
from lvctx.train.chat_rows import ChatRow, RowReader
from lvctx.train.data import indices
from lvctx.train.loop import Group, TrainConfig, train
from lvctx.vision.hybrid import Hybrid
from lvctx.vlm.qwen_vl import QwenVL


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What decides the weights, besides model, positions and rows."""

    seq_len: int
    """Tokens that no row exceeds: the rows' own."""
    steps: int
    """Optimizer steps."""
    batch: int
    """Rows a step; the paper states none."""
    lr: float
    """Peak rate, constant after the warm-up; the paper states none, 1e-4 is usual for LoRA."""
    warmup: float
    """Fraction of the steps; LLaVA 0.03."""
    lora: int
    """Rank of LoRA on the language model's attention; 0 trains all its weights. LoRA in the paper, of unstated rank."""
    checkpoint_activations: bool
    """Recompute each layer in the backward pass instead of keeping its activations."""
    seed: int
    """Order of the rows and LoRA's initialisation."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A checked run's training."""

    config: TrainingConfig
    """With every default resolved."""
    rows: ChatRows
    """What is read."""
    media: Path
    """Folder that the rows' paths are relative to."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stretched checkpoint and how it is trained."""

    plan: Plan
    """What is stretched, and how far."""
    training: Training
    """On what."""

    @property
    def provenance(self) -> Provenance:
        """What identifies the run."""
        return self.plan.provenance


STAGE_KEYS: dict[str, Callable[[str], Any]] = {
    "scale": float,
    "data": Path,
    "seq_len": int,
    "steps": int,
    "batch": int,
    "lr": float,
}
"""What a stage of a progressive schedule may set (`stages.progressive`)."""


def plan_stage(
    *,
    model: str,
    scale: float,
    original_length: int | None,
    method: Method | None,
    ramp: Ramp,
    force: bool,
    **training: Any,
) -> Run:
    """`plan_mrope` and `plan_training` in one."""
    stretched = plan_mrope(
        model=model, scale=scale, original_length=original_length, method=method, ramp=ramp, force=force
    )
    return plan_training(stretched, **training)


def unite(last: Run, first: Run, provenance: Provenance) -> Run:
    """The last stage under the name of the whole run; its manifest goes on saying how far the model is stretched."""
    config = {**last.provenance.config, **provenance.config}
    return replace(last, plan=replace(last.plan, provenance=replace(provenance, config=config)))


def plan_training(
    plan: Plan,
    *,
    data: Path,
    media: Path,
    seq_len: int | None,
    hybrid: Hybrid | None,
    steps: int,
    batch: int,
    lr: float,
    warmup: float,
    lora: int,
    checkpoint_activations: bool,
    seed: int,
) -> Run:
    """Check packed rows against the model and the flags; the run, whose plan also names them.

    Raises UsageError and InputError; loads no weights and opens no media.
    """
    checkpoint_ = plan.checkpoint
    if checkpoint_.model_type not in ("qwen2_vl", "qwen2_5_vl"):
        raise UsageError(f"{checkpoint_.model_type} is stretched but not trained here", fix="drop --data")
    if lr <= 0:
        raise UsageError("--lr 0 trains nothing")
    rows = ChatRows(data)
    made = rows.manifest["config"]
    if seq_len is not None and seq_len < rows.target_length:
        raise UsageError(
            f"rows of up to {rows.target_length} tokens are not cut to {seq_len}", fix="pack-chat --target-length"
        )
    if hybrid is not None and Hybrid(**(made["hybrid"] or {})) != hybrid:
        raise InputError("packed at another resolution", where=data, fix="pack-chat with this --hybrid")
    _check_tokens(rows, checkpoint_.path, data)
    config = TrainingConfig(
        seq_len=rows.target_length,
        steps=steps,
        batch=batch,
        lr=lr,
        warmup=warmup,
        lora=lora,
        checkpoint_activations=checkpoint_activations,
        seed=seed,
    )
    provenance = replace(
        plan.provenance,
        config={**plan.provenance.config, "training": asdict(config)},
        inputs={**plan.provenance.inputs, "data": fingerprint(data)},
        seed=seed,
    )
    training = Training(config=config, rows=rows, media=media)
    return Run(plan=replace(plan, provenance=provenance), training=training)


def pack_samples(
    file: Path,
    out: Path,
    *,
    model: str,
    media: Path,
    seq_len: int,
    hybrid: Hybrid | None,
    fps: float,
    allow_partial: bool = False,
    seed: int,
    report: Callable[[int, int, str], None],
) -> Path:
    """Pack a file of chat samples as `pack-chat` does without a mix, beside the output; the packed directory."""
    target = out.with_name(f"{out.name}-chat")
    config = PackChatConfig(
        interleaved=(file,),
        out=target,
        model=model,
        media=media,
        target_length=seq_len,
        long_share=0.0,
        hybrid=f"{hybrid.group},{hybrid.tokens},{hybrid.ratio}" if hybrid else None,
        hybrid_mode=hybrid.mode if hybrid else "pair",
        video_fps=fps,
        allow_partial=allow_partial,
        seed=seed,
    )
    run_pack_chat(plan_pack_chat(config), on_progress=report)
    return target


def _check_tokens(rows: ChatRows, model: Path, data: Path) -> None:
    """Rows of another tokenizer would be words of another language: their placeholders give them away first."""
    rule = QwenVL(model).rule(Hybrid())
    for number in range(len(rows)):
        ids = rows.row(number)
        for sample in rows.samples(number):
            for item in sample["media"]:
                if ids[item["blocks"][0][0]] not in rule.pads.values():
                    raise InputError("packed for another model", where=data, fix=f"pack-chat --model {model} again")
                return


def run_training(
    run: Run,
    out: Path,
    *,
    resume: str,
    force: bool,
    machine: Machine,
    report: Callable[[int, int, str], None],
) -> None:
    """Train (or resume) and write the stretched model to `out`; nothing to do if it stands finished.

    Under torchrun every rank calls it, and rank 0 writes.
    """
    plan, training = run.plan, run.training
    if is_finished(out, plan.provenance, resume=resume, force=force):
        return
    with open_context(device=machine.device, cp=machine.cp, sharded=machine.offload) as world, ExitStack() as held:
        if world.rank == 0:
            held.enter_context(only_writer(out))
            if force or resume == "never":
                checkpoint.remove(out)
            clear(out)
        world.barrier()
        vlm = _train(plan, training, out, machine, world, report)
        if world.rank == 0:
            write_checkpoint(plan, out, weights=lambda: _save_weights(vlm, out), trained_length=training.config.seq_len)
            checkpoint.remove(out)
        world.barrier()


def _save_weights(vlm: Any, out: Path) -> list[str]:
    """Write the weights alone, under the checkpoint's own names; the names of all files of weights."""
    with scratch(out / "model") as whole:
        vlm.to(vlm.config.dtype or torch.bfloat16).save_pretrained(whole)
        names = sorted(p.name for p in whole.glob("model*.safetensors*"))
        for name in names:
            (whole / name).replace(out / name)
    return [*names, *(f"{ADAPTER}/{p.name}" for p in sorted((out / ADAPTER).glob("adapter_*")))]


def load_stretched(plan: Plan, device: str) -> Any:
    """The model with its new positions."""
    config = load_config(plan.checkpoint.path)
    text = config.get_text_config()
    text.rope_parameters, text.max_position_embeddings = plan.rope, plan.context
    vlm = load_model(plan.checkpoint.path, config=config, device=device)
    try_forward(vlm, plan.checkpoint.path)
    return vlm


def adapt(vlm: Any, config: TrainingConfig) -> tuple[list[nn.Parameter], Any]:
    """Freeze all but what trains; the trained parameters, and LoRA's wrapper of the language model if there is one."""
    vlm.requires_grad_(False)
    if config.lora:
        wrapped = add_lora(vlm.model.language_model, rank=config.lora, targets=ATTENTION, seed=config.seed)
        return [p for p in wrapped.parameters() if p.requires_grad], wrapped
    parts = [part.float().requires_grad_(True) for part in (vlm.model.language_model, vlm.lm_head)]
    return list({id(p): p for part in parts for p in part.parameters()}.values()), None


def _train(
    plan: Plan,
    training: Training,
    out: Path,
    machine: Machine,
    world: ParallelContext,
    report: Callable[[int, int, str], None],
) -> Any:
    """The trained model; on ranks other than 0, None."""
    config, rows, path = training.config, training.rows, plan.checkpoint.path
    if config.batch < world.dp:
        raise UsageError(f"--batch {config.batch} for {world.dp} data-parallel groups", fix="raise it or --cp")
    vlm = load_stretched(plan, "cpu" if world.mesh is not None else world.device)
    parameters, wrapped = adapt(vlm, config)
    lm = vlm.model.language_model
    if world.cp > 1:
        attention.use(lm, where=path)
    if config.checkpoint_activations:
        checkpoint_layers(lm, offload=machine.offload_activations)
    chat_loss = ChatLoss(vlm, world.ring)
    shard_model(chat_loss, lm.layers, world, offload=machine.offload)
    parameters = [p for p in chat_loss.parameters() if p.requires_grad] if world.mesh is not None else parameters
    rule = QwenVL(path).rule(Hybrid(**(rows.manifest["config"]["hybrid"] or {})))
    processor = load_image_processor(path)
    per_second = Rules.of(vlm.config).tokens_per_second
    reader = RowReader(rows, training.media, rule, processor, tokens_per_second=per_second)

    def batch(step: int) -> Sequence[int]:
        return indices(step, batch=config.batch, samples=len(rows), seed=config.seed)

    def loss(number: int) -> tuple[Tensor, int]:
        total, count = chat_loss(**shard_chat(reader.read(number), world))
        return total, count

    train(
        groups=[Group(name="lm", parameters=parameters, lr=config.lr)],
        batch=batch,
        loss=loss,
        config=TrainConfig(steps=config.steps, schedule="constant", warmup=config.warmup, weight_decay=0.0),
        out=out,
        run=plan.provenance,
        report=report,
        world=world,
        name=lambda number: f"row {number}",
    )
    if world.mesh is not None:
        twin = load_stretched(plan, "cpu") if world.rank == 0 else None
        wrapped = adapt(twin, config)[1] if twin is not None else None
        gather_into(twin, vlm)
        vlm = twin
    if wrapped is not None:
        if world.rank == 0:
            save_adapter(out, vlm, wrapped, plan.provenance, longest=config.seq_len)
        vlm.model.language_model = merge_lora(wrapped)
    return vlm


class ChatLoss(nn.Module):
    """A Qwen-VL model and its loss on a row as one module: where parameters are sharded, they are gathered in it."""

    def __init__(self, vlm: Any, ring: Ring) -> None:
        super().__init__()
        self.vlm, self.ring = vlm, ring

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        positions: Tensor,
        patches: Tensor | None,
        grids: Tensor,
        **attention: Any,
    ) -> tuple[Tensor, int]:
        """Summed loss and counted tokens of this rank's part: ids (1, L) whole, labels and positions its own."""
        model = self.vlm.model
        is_visual = (ids == self.vlm.config.image_token_id) | (ids == self.vlm.config.video_token_id)
        embeds_1LE = model.get_input_embeddings()(ids.masked_fill(is_visual, 0))
        if patches is not None:
            with torch.no_grad():
                seen = torch.cat(list(model.get_video_features(patches, grids).pooler_output))
            embeds_1LE = embeds_1LE.masked_scatter(is_visual[..., None], seen.to(embeds_1LE.dtype))
        embeds_1LE = shard(embeds_1LE, rank=self.ring.rank, world=self.ring.world, fill=0, dim=1)
        hidden = model.language_model(
            inputs_embeds=embeds_1LE, position_ids=positions, use_cache=False, **attention
        ).last_hidden_state
        head = self.vlm.lm_head.weight
        total, count = token_loss(hidden.flatten(0, 1), head, labels.flatten())
        return keep_in_graph(total, hidden, head), count


def shard_chat(row: ChatRow, world: ParallelContext) -> Mapping[str, Any]:
    """A row as `ChatLoss` takes it on this rank: its part of labels and positions, and all pixels.

    Every rank of a row embeds all of it and then keeps its part: a tower's work is small beside a long row's.
    """
    ring, device = world.ring, world.device
    own = {"rank": ring.rank, "world": ring.world}
    given: dict[str, Any] = {
        "ids": row.ids_L[None].to(device),
        "labels": shard(row.labels_L[None], fill=IGNORED, **own).to(device),
        "positions": shard(row.positions_3L[:, None], fill=0, **own).to(device),
        "patches": None if row.patches is None else row.patches.to(device),
        "grids": row.grids_B3.to(device),
    }
    return given if ring.world == 1 else given | {"shard": Shard(ring=ring)}
