"""Train an extended Qwen-VL model on long chat rows: its language model, fully or with LoRA (GIRAFFE, appendix E).

The embeddings are frozen with LoRA. Tower and merger are frozen unless they have a learning rate; the paper compares
with such an alignment before the training (table 2). The output is that of `mrope-extend` without training, except for
the weights, together with the LoRA adapter.

Shapes: L tokens of a row, N visual tokens in it, E width of the language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.store import fingerprint, move_written, scratch
from lvctx.config import OnProgress, hashed_fields
from lvctx.data.pack_chat import plan_pack_chat, run_pack_chat
from lvctx.data.pack_chat_config import PackChatConfig
from lvctx.data.packed_chat import ChatRows
from lvctx.errors import InputError, UsageError
from lvctx.models.adapter import ADAPTER
from lvctx.models.loading import load_config, load_image_processor, load_model, try_forward
from lvctx.models.lora import ATTENTION, Gather, add_lora
from lvctx.models.loss import IGNORED, token_loss
from lvctx.models.saving import write_model
from lvctx.parallel import hf_attention
from lvctx.parallel.context import ParallelContext
from lvctx.parallel.fsdp import keep_in_graph
from lvctx.parallel.hf_attention import Shard
from lvctx.parallel.ring_attention import Ring
from lvctx.rope.mrope_positions import tokens_per_second
from lvctx.training.chat_rows import ChatRow, RowReader, check_tokens
from lvctx.training.mrope_checkpoint import MropeJob, clear, resolve_mrope, write_checkpoint
from lvctx.training.mrope_config import MropeConfig
from lvctx.training.parallel_config import ParallelConfig
from lvctx.training.row_order import indices
from lvctx.training.task import ParameterGroup, TrainableModel, TrainConfig, TrainingTask
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.qwen_vl import QwenVL
from lvctx.vlm.registry import open_vlm
from lvctx.vlm.token_count import QwenRule


@dataclass(frozen=True, kw_only=True)
class MropeTrainingJob(MropeJob):
    """A checked run that trains."""

    rows: ChatRows
    """Packed chat to train on."""

    def task(self) -> "MropeTask":
        """The training."""
        return MropeTask(self)

    def as_final_stage(self, first: Self, provenance: Provenance) -> Self:
        """This job under the provenance of a run of several stages, with this stage's scaling."""
        config = {**self.provenance.config, **provenance.config}
        return replace(self, provenance=replace(provenance, config=config))


def resolve_mrope_training(config: MropeConfig, *, force: bool = False) -> MropeTrainingJob:
    """Check model, options and packed rows; `config.data` are packed rows.

    Raises UsageError and InputError; loads no weights and opens no media.
    """
    job, data = resolve_mrope(config, force=force), config.data
    assert data is not None
    if not (config.lr or config.merger_lr or config.tower_lr):
        raise UsageError("nothing trains at --lr 0", fix="give it, --merger-lr or --tower-lr a learning rate")
    rows = ChatRows(data)
    if config.seq_len is not None and config.seq_len < rows.target_length:
        longer = f"rows have up to {rows.target_length} tokens and cannot be cut to {config.seq_len}"
        raise UsageError(longer, fix="run pack-chat again with --target-length")
    hybrid = requested_hybrid(config)
    if hybrid is not None and packed_hybrid(rows) != hybrid:
        raise InputError("packed at another resolution", where=data, fix="run pack-chat with this --hybrid")
    check_tokens(rows, job.checkpoint.path)
    resolved = replace(config, seq_len=rows.target_length)
    provenance = replace(
        job.provenance,
        config={**job.provenance.config, "training": hashed_fields(resolved)},
        inputs={**job.provenance.inputs, "data": fingerprint(data)},
        seed=config.seed,
    )
    base = {name: getattr(job, name) for name in ("checkpoint", "scaling", "context", "note")}
    return MropeTrainingJob(config=resolved, provenance=provenance, rows=rows, **base)


def requested_hybrid(config: MropeConfig) -> Hybrid | None:
    """The resolution that the options set; None if they set none. Raises UsageError."""
    hybrid = Hybrid.parse(config.hybrid) if config.hybrid else None
    return VideoSampling(hybrid=hybrid, hybrid_mode=config.hybrid_mode).resolution


def packed_hybrid(rows: ChatRows) -> Hybrid:
    """The resolution that rows were packed with."""
    return Hybrid(**(rows.manifest["config"]["hybrid"] or {}))


def _rule(model: Path, hybrid: Hybrid) -> QwenRule:
    vlm = open_vlm(model, weights=False)
    assert isinstance(vlm, QwenVL)
    return vlm.rule(hybrid)


def pack_samples_file(config: MropeConfig, seq_len: int, on_progress: OnProgress) -> Path:
    """Pack `config.data`, a file of chat samples, as `pack-chat` does without a mix; returns the new directory."""
    assert config.data is not None
    target = config.out.with_name(f"{config.out.name}-chat")
    hybrid = requested_hybrid(config)
    packing = PackChatConfig(
        interleaved=(config.data,),
        out=target,
        model=config.model,
        media=config.media,
        hybrid=f"{hybrid.group},{hybrid.tokens},{hybrid.ratio}" if hybrid else None,
        hybrid_mode=hybrid.mode if hybrid else "pair",
        target_length=seq_len,
        long_share=None,
        video_fps=config.fps,
        allow_partial=config.allow_partial,
        seed=config.seed,
    )
    run_pack_chat(plan_pack_chat(packing), on_progress=on_progress)
    return target


class MropeTask(TrainingTask[int]):
    """Cross-entropy of the answers in packed chat; a micro-batch is the number of a row."""

    def __init__(self, job: MropeTrainingJob) -> None:
        self.job, self.config, self.provenance = job, job.config, job.provenance
        self.inputs = [job.checkpoint.path, job.rows.directory]
        self.datasets = job.rows.manifest.get("datasets", ())
        self.train_config = TrainConfig(
            steps=job.config.steps, schedule="constant", warmup=job.config.warmup, weight_decay=0.0
        )

    def clear(self, out: Path) -> None:
        """Remove files that may be links to the weights of a model."""
        clear(out)

    def load(self, device: str) -> TrainableModel:
        """The VLM with its new positions."""
        path, config = self.job.checkpoint.path, self.config
        model_config = load_config(path)
        text = model_config.get_text_config()
        text.rope_parameters, text.max_position_embeddings = self.job.rope, self.job.context
        vlm = load_model(path, config=model_config, device=device).requires_grad_(False)
        try_forward(vlm, path)
        groups, lora = _trained_parts(vlm, config)
        return TrainableModel(model=vlm, groups=groups, decoder=vlm.model.language_model, lora=lora)

    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> nn.Module:
        """The VLM with its loss."""
        path, batch = self.job.checkpoint.path, self.config.batch
        if batch < context.dp:
            raise UsageError(f"--batch {batch} for {context.dp} data-parallel groups", fix="raise it or --cp")
        if parallel.micro_tokens is not None:
            raise UsageError("--micro-tokens is not supported here, since a forward pass takes one row", fix="drop it")
        if context.cp > 1:
            hf_attention.use(trainable.decoder, where=path, ring=context.ring)
        rule = _rule(path, packed_hybrid(self.job.rows))
        per_second = tokens_per_second(trainable.model.config)
        processor = load_image_processor(path)
        self.reader = RowReader(self.job.rows, self.config.media, rule, processor, tokens_per_second=per_second)
        self.context, self.chat_loss = context, ChatLoss(trainable.model, context.ring)
        return self.chat_loss

    def batches(self, step: int) -> Sequence[int]:
        """Numbers of the rows of a step."""
        return indices(step, batch=self.config.batch, samples=len(self.job.rows), seed=self.config.seed)

    def loss(self, micro: int) -> tuple[Tensor, int]:
        """Loss of a row."""
        total, count = self.chat_loss(**shard_chat(self.reader.read(micro), self.context))
        return total, count

    def describe(self, micro: int) -> str:
        """The row's number."""
        return f"row {micro}"

    def longest_sample(self, metrics: Sequence[dict[str, Any]]) -> int:
        """Upper bound for the tokens of a row."""
        return self.job.rows.target_length

    def save(
        self, model: Any, out: Path, metrics: Sequence[dict[str, Any]], gather: Gather
    ) -> tuple[list[str], dict[str, Any]]:
        """Write the weights, and link or write the rest as `mrope-extend` does without training."""

        def write_weights() -> list[str]:
            with scratch(out / "model") as folder:
                write_model(model, folder, dtype=model.config.dtype or torch.bfloat16, gather=gather)
                names = sorted(p.name for p in folder.glob("model*.safetensors*"))
                for name in names:
                    move_written(folder / name, out / name)
            return [*names, *(f"{ADAPTER}/{p.name}" for p in sorted((out / ADAPTER).glob("adapter_*")))]

        return write_checkpoint(self.job, out, weights=write_weights, trained_length=self.job.rows.target_length)


def _trained_parts(vlm: Any, config: MropeConfig) -> tuple[list[ParameterGroup], Any]:
    """The trained groups of a frozen model, and the LoRA wrapper if there is one."""
    decoder, lora = vlm.model.language_model, None
    lm = [decoder, vlm.lm_head]
    if config.lr and config.lora:
        lm = [lora := add_lora(decoder, rank=config.lora, targets=ATTENTION, seed=config.seed)]
    elif config.lr:
        lm = [part.requires_grad_(True) for part in lm]
    groups = [ParameterGroup(name="lm", modules=lm, lr=config.lr)] if config.lr else []
    parts = dict(vlm.model.visual.named_children())
    # Qwen3-VL has a merger for each layer of the tower whose features go to the language model.
    merger = [parts.pop(name) for name in ("merger", "deepstack_merger_list") if name in parts]
    for name, modules, lr in (("merger", merger, config.merger_lr), ("tower", list(parts.values()), config.tower_lr)):
        if lr:
            modules = [part.requires_grad_(True) for part in modules]
            groups.append(ParameterGroup(name=name, modules=modules, lr=lr))
    return groups, lora


class ChatLoss(nn.Module):
    """A Qwen-VL model and its loss on a row as one module: sharded parameters are gathered in its forward."""

    def __init__(self, vlm: Any, ring: Ring) -> None:
        super().__init__()
        self.vlm, self.ring = vlm, ring

    def forward(
        self, ids: Tensor, labels: Tensor, positions: Tensor, patches: Tensor | None, grids: Tensor, **attention: Any
    ) -> tuple[Tensor, int]:
        """Summed loss and counted tokens of this rank's part: ids (1, L) complete, labels and positions its own."""
        model = self.vlm.model
        is_visual = (ids == self.vlm.config.image_token_id) | (ids == self.vlm.config.video_token_id)
        embeds_1LE = model.get_input_embeddings()(ids.masked_fill(is_visual, 0))
        if patches is None and any(parameter.requires_grad for parameter in model.visual.parameters()):
            # Every rank's tower takes part in the backward pass, also for a row without images.
            size = model.visual.patch_embed.proj.weight.shape[1:].numel()
            patches, grids = torch.zeros(4, size, device=ids.device), torch.tensor([[1, 2, 2]], device=ids.device)
        deep_1LE: list[Tensor] = []
        if patches is not None:
            features = model.get_video_features(patches, grids)
            empty_1LE = torch.zeros_like(embeds_1LE)
            embeds_1LE, *deep_1LE = [
                into.masked_scatter(is_visual[..., None], torch.cat(list(rows_NE)).to(into.dtype))
                for into, rows_NE in [
                    (embeds_1LE, features.pooler_output),
                    *((empty_1LE, layer) for layer in getattr(features, "deepstack_features", None) or ()),
                ]
            ]
        shard = partial(self.ring.shard, fill=0, dim=1)
        embeds_1LE = shard(embeds_1LE)
        if deep_1LE:  # Qwen3-VL: its first layers get visual features too
            attention["visual_pos_masks"] = mask_1L = shard(is_visual)
            attention["deepstack_visual_embeds"] = [shard(layer)[mask_1L] for layer in deep_1LE]
        hidden = model.language_model(
            inputs_embeds=embeds_1LE, position_ids=positions, use_cache=False, **attention
        ).last_hidden_state
        head = self.vlm.lm_head.weight
        total, count = token_loss(hidden.flatten(0, 1), head, labels.flatten())
        return keep_in_graph(total, hidden, head), count


def shard_chat(row: ChatRow, world: ParallelContext) -> Mapping[str, Any]:
    """A row as `ChatLoss` takes it on this rank: its part of labels and positions, and all pixels.

    Every rank of a row embeds all of it and then keeps its part: the tower's cost is small compared with a long row's.
    """
    ring, device = world.ring, world.device
    inputs: dict[str, Any] = {
        "ids": row.ids_L[None].to(device),
        "labels": ring.shard(row.labels_L[None], fill=IGNORED).to(device),
        "positions": ring.shard(row.positions_3L[:, None], fill=0).to(device),
        "patches": None if row.patches is None else row.patches.to(device),
        "grids": row.grids_B3.to(device),
    }
    return inputs if ring.world == 1 else inputs | {"shard": Shard(ring=ring)}
