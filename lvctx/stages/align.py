"""Teach a language model to see, with single images only: first the projector, then the whole model (or LoRA).

LongVA section 3.2 and LLaVA-1.6: stage `projector` trains the MLP alone on caption pairs; stage `full` trains
projector, language model and tower on instructions. Images go through UniRes: their grids look to the model like a
video's frames.

Shapes: B samples, L tokens of the longest, E language-model width, N visual tokens.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lvctx.artifacts import schemas
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import MANIFEST, Provenance, is_finished, write_manifest
from lvctx.artifacts.store import fingerprint
from lvctx.dist import checkpoint
from lvctx.dist.mesh import World, open_world
from lvctx.dist.shard import gather_into, shard_model, take_part
from lvctx.errors import UsageError
from lvctx.model.adapter import ADAPTER, load_adapter, save_adapter
from lvctx.model.export import model_files
from lvctx.model.load import (
    VLM_TYPE,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    trained_length,
)
from lvctx.model.lora import ATTENTION, add_lora, merge_lora
from lvctx.model.loss import IGNORED, token_loss
from lvctx.model.vlm import assemble, embed_frames, frame_features, newline_id, save_vlm, tokens_per_frame
from lvctx.train.chat import Conversation, TokenSequence, encode_conversation, read_conversations
from lvctx.train.data import indices
from lvctx.train.loop import Group, TrainConfig, train
from lvctx.vision.grids import GridRule, unires_grid, unires_tiles
from lvctx.vision.images import Preprocess, image_size, open_image
from lvctx.vision.tower import load_vision_model

log = logging.getLogger(__name__)
Stage = Literal["projector", "full"]


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What decides an aligned model, besides models and data."""

    stage: Stage
    """`projector`: tower and language model frozen. `full`: all trained."""
    grid_rule: GridRule
    """UniRes as the released code (`code`) or as the paper's text (`paper`)."""
    steps: int
    """Optimizer steps."""
    batch: int
    """Samples a step; LongVA 128 (projector), 32 (full)."""
    lr: float
    """Peak rate; LongVA 1e-3 (projector), 1e-5 (full)."""
    projector_lr: float
    """Peak rate of the projector: `lr` unless it has its own; 0 freezes it in stage `full`."""
    tower_lr: float
    """Peak rate of the tower in stage `full`; LLaVA 2e-6; 0 freezes it."""
    warmup: float
    """Fraction of the steps; LLaVA 0.03. The schedule is cosine."""
    lora: int
    """Rank of LoRA on the language model's attention in stage `full`; 0 trains all its weights, as LongVA."""
    max_length: int
    """Tokens after which a sample is cut; LongVA 32,768."""
    seed: int
    """Order of the samples, projector's and LoRA's initialisation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run."""

    config: AlignConfig
    """With every default resolved."""
    lm: Path | None
    """Language model to start from, with `tower`."""
    tower: Path | None
    """Tower to start from."""
    init: Path | None
    """VLM to go on from, instead of the two."""
    adapters: tuple[Path, ...]
    """What earlier alignments trained (`ADAPTER`), to start from; the later wins."""
    conversations: list[Conversation]
    """Training samples."""
    provenance: Provenance
    """What identifies the run."""


DEFAULTS: dict[Stage, dict[str, float]] = {
    "projector": {"lr": 1e-3, "batch": 128},
    "full": {"lr": 1e-5, "batch": 32},
}
"""LongVA's learning rates and batch sizes."""


def plan_align(
    *,
    stage: Stage,
    lm: str | None,
    tower: str | None,
    init: str | None,
    adapters: Sequence[Path],
    data: Path,
    images: Path,
    grid_rule: GridRule,
    steps: int | None,
    epochs: float | None,
    batch: int | None,
    lr: float | None,
    projector_lr: float | None,
    tower_lr: float,
    warmup: float,
    lora: int,
    max_length: int,
    seed: int,
) -> Plan:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError; loads no weights."""
    if (init is None) == (lm is None and tower is None):
        raise UsageError("give either --init, or --lm and --tower")
    if init is None and (lm is None or tower is None):
        raise UsageError("--lm and --tower go together")
    if stage == "projector" and lora:
        raise UsageError("--lora trains the language model: it goes with --stage full")
    if steps is not None and epochs is not None:
        raise UsageError("give --steps or --epochs, not both")
    if adapters and not lora:
        raise UsageError("--adapter holds a LoRA: it goes with --lora")
    if stage == "projector" and projector_lr is not None:
        raise UsageError("--projector-lr goes with --stage full", fix="--lr is the projector's rate here")
    if (stage == "projector" and lr == 0) or (stage == "full" and lr == 0 and not projector_lr and not tower_lr):
        raise UsageError("every rate is 0: nothing would be trained", fix="raise --lr")
    paths = {k: resolve_model(v) for k, v in {"lm": lm, "tower": tower, "init": init}.items() if v}
    conversations = read_conversations(data, images)
    size = batch or int(DEFAULTS[stage]["batch"])
    rate = DEFAULTS[stage]["lr"] if lr is None else lr
    config = AlignConfig(
        stage=stage,
        grid_rule=grid_rule,
        steps=steps or max(1, round((epochs or 1) * len(conversations) / size)),
        batch=size,
        lr=rate,
        projector_lr=rate if projector_lr is None else projector_lr,
        tower_lr=tower_lr if stage == "full" else 0.0,
        warmup=warmup,
        lora=lora,
        max_length=max_length,
        seed=seed,
    )
    pictures = hashlib.sha256()
    for image in sorted({i for c in conversations for i in c.images}):
        pictures.update(f"{image.relative_to(images)}\0{image.stat().st_size}\n".encode())
    inputs = {k: fingerprint(p) for k, p in paths.items()}
    inputs |= {"data": fingerprint(data), "images": pictures.hexdigest()}
    inputs |= {f"adapter-{i}": fingerprint(adapter) for i, adapter in enumerate(adapters)}
    return Plan(
        config=config,
        lm=paths.get("lm"),
        tower=paths.get("tower"),
        init=paths.get("init"),
        adapters=tuple(adapters),
        conversations=conversations,
        provenance=Provenance(schema=schemas.MODEL, command="align", config=asdict(config), inputs=inputs, seed=seed),
    )


def run_align(
    plan: Plan,
    out: Path,
    *,
    resume: str,
    force: bool,
    micro_tokens: int,
    device: str,
    report: Callable[[int, int, str], None],
) -> None:
    """Train (or resume) and write the aligned VLM to `out`; nothing to do if it stands finished.

    `micro_tokens` bounds the padded tokens of one forward; it changes speed and memory, not the result's definition.
    """
    if is_finished(out, plan.provenance, resume=resume, force=force):
        return
    with open_world(device=device) as world, ExitStack() as held:
        if world.rank == 0:
            held.enter_context(only_writer(out))
            if force or resume == "never":
                checkpoint.remove(out)
                (out / MANIFEST).unlink(missing_ok=True)
        world.barrier()
        trained = _train(plan, out, micro_tokens=micro_tokens, world=world, report=report)
        if world.rank == 0:
            _save(plan, out, *trained)
        world.barrier()


def _save(plan: Plan, out: Path, vlm: Any, tokenizer: Any, wrapped: Any, longest: int) -> None:
    """Write the trained VLM, and where there is LoRA the adapter."""
    if wrapped is not None:
        save_adapter(out / ADAPTER, vlm, wrapped, plan.provenance)
        vlm.model.language_model = merge_lora(wrapped)
    vlm.to(vlm.config.dtype)
    pixels_from, source = plan.init or plan.tower, plan.init or plan.lm
    assert pixels_from is not None
    assert source is not None
    save_vlm(vlm, tokenizer, pixels_from, out)
    facts = {
        "context": context_length(vlm.config),
        "trained_length": trained_length(source),
        "longest_sample": longest,
    }
    write_manifest(out, plan.provenance, model_files(out), **facts)
    checkpoint.remove(out)


def _load(plan: Plan, device: str) -> tuple[Any, Any, Path]:
    """The VLM to train, its tokenizer, and the directory that says how pixels are prepared."""
    if plan.init is not None:
        if load_config(plan.init).model_type != VLM_TYPE:
            raise UsageError(f"--init {plan.init} is no VLM", fix="start with --lm and --tower")
        return load_model(plan.init, device=device), load_tokenizer(plan.init), plan.init
    assert plan.lm is not None
    assert plan.tower is not None
    lm = load_model(plan.lm)
    tokenizer = load_tokenizer(plan.lm)
    tower = load_vision_model(plan.tower, dtype=lm.dtype)
    vlm = assemble(lm, tower, tokenizer, where=plan.lm, seed=plan.config.seed)
    return vlm.to(device), tokenizer, plan.tower


def _train(
    plan: Plan, out: Path, *, micro_tokens: int, world: World, report: Callable[[int, int, str], None]
) -> tuple[Any, Any, Any, int]:
    """The trained VLM (on rank 0 if there are several), its tokenizer, its LoRA wrapper, and the longest sample."""
    config = plan.config
    device = world.device
    vlm, tokenizer, pixels_from = _load(plan, "cpu" if world.mesh is not None else device)
    preprocess = Preprocess.from_directory(pixels_from)
    tile = vlm.config.vision_config.image_size
    per_frame = tokens_per_frame(vlm.config)
    trained, wrapped = _trained(vlm, config)
    for adapter in plan.adapters:
        load_adapter(adapter, vlm, wrapped)
    line_end = newline_id(tokenizer)
    video = vlm.config.video_token_id
    longest = 0

    def block_length(image: Path) -> int:
        columns, rows = unires_grid(*image_size(image), tile=tile, rule=config.grid_rule)
        return columns * rows * per_frame + 1

    def batch(step: int) -> list[list[tuple[Conversation, TokenSequence]]]:
        chosen = indices(step, batch=config.batch, samples=len(plan.conversations), seed=config.seed)
        samples = []
        for i in chosen:
            sequence = encode_conversation(plan.conversations[i], tokenizer, block_length)
            if len(sequence.ids) > config.max_length:
                log.warning(
                    "%s: %d tokens, cut at %d", plan.conversations[i].where, len(sequence.ids), config.max_length
                )
                sequence = TokenSequence(
                    ids=sequence.ids[: config.max_length],
                    labels=[*sequence.labels[: config.max_length - 1], IGNORED],
                )
            samples.append((plan.conversations[i], sequence))
        nonlocal longest
        longest = max(longest, *(len(s.ids) for _, s in samples))
        return group_by_length(samples, micro_tokens)

    def loss(micro: list[tuple[Conversation, TokenSequence]]) -> tuple[Tensor, int]:
        ids_BL, labels_BL, mask_BL = pad([s for _, s in micro], tokenizer.pad_token_id or 0, device)
        is_visual_BL = (ids_BL == video) & mask_BL
        embeddings = vlm.get_input_embeddings()
        embeds_BLE = embeddings(ids_BL.masked_fill(is_visual_BL, 0))
        visual = []
        for (conversation, _), row in zip(micro, is_visual_BL, strict=True):
            blocks = [
                torch.cat([_embed_image(vlm, image, preprocess, tile, config), embeddings.weight[line_end][None]])
                for image in conversation.images
            ]
            visual += [torch.cat(blocks)[: int(row.sum())]] if blocks else []
        if visual:
            visual_NE = torch.cat(visual).to(embeds_BLE.dtype)
            embeds_BLE = embeds_BLE.masked_scatter(is_visual_BL[..., None], visual_NE)
        else:
            # What trains must take part in every backward: ranks add their gradients up in step.
            blank = torch.zeros(1, 3, tile, tile, device=device, dtype=vlm.model.vision_tower.dtype)
            embeds_BLE = embeds_BLE + 0 * embed_frames(vlm, frame_features(vlm, blank)).sum().to(embeds_BLE.dtype)
        lm, head = vlm.model.language_model, vlm.lm_head.weight
        hidden = lm(inputs_embeds=embeds_BLE, attention_mask=mask_BL, use_cache=False).last_hidden_state
        total, count = token_loss(hidden.flatten(0, 1), head, labels_BL.flatten())
        return take_part(total, hidden, head), count

    entered = _Entered(vlm, loss)
    shard_model(entered, vlm.model.language_model.get_submodule("layers"), world)
    train(
        groups=[Group(name=name, parameters=_parameters(parts), lr=lr) for name, parts, lr in trained],
        batch=batch,
        loss=entered,
        config=TrainConfig(
            steps=config.steps, schedule="cosine", warmup=config.warmup, weight_decay=0.0, betas=(0.9, 0.999)
        ),
        out=out,
        run=plan.provenance,
        report=report,
        world=world,
        name=lambda micro: ", ".join(conversation.where for conversation, _ in micro),
    )
    if world.mesh is not None:
        twin = _load(plan, "cpu")[0] if world.rank == 0 else None
        wrapped = _trained(twin, config)[1] if twin is not None else None
        gather_into(twin, vlm)
        vlm = twin
    return vlm, tokenizer, wrapped, longest


class _Entered(nn.Module):
    """The VLM and a loss on it as one module: where parameters are sharded, they are gathered in it."""

    def __init__(self, vlm: Any, loss: Callable[[Any], tuple[Tensor, int]]) -> None:
        super().__init__()
        self.vlm, self.loss = vlm, loss

    def forward(self, micro: Any) -> tuple[Tensor, int]:
        return self.loss(micro)


def _trained(vlm: Any, config: AlignConfig) -> tuple[list[tuple[str, list[nn.Module], float]], Any]:
    """Freeze what the stage freezes; what trains at which peak rate, and the language model's LoRA wrapper if any."""
    vlm.requires_grad_(False)
    trained: list[tuple[str, list[nn.Module], float]] = []
    projector = vlm.model.multi_modal_projector.float()
    if config.projector_lr:
        trained.append(("projector", [projector.requires_grad_(True)], config.projector_lr))
    if config.stage == "projector":
        return trained, None
    wrapped = None
    if config.lora:
        wrapped = add_lora(vlm.model.language_model, rank=config.lora, targets=ATTENTION, seed=config.seed)
        trained.append(("lm", [wrapped], config.lr))
    else:
        lm = [part.float().requires_grad_(True) for part in (vlm.model.language_model, vlm.lm_head)]
        trained.append(("lm", lm, config.lr))
    if config.tower_lr:
        trained.append(("tower", [vlm.model.vision_tower.float().requires_grad_(True)], config.tower_lr))
    return trained, wrapped


def _parameters(parts: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The trained parameters, each once: the head may share its weight with the embedding."""
    return list({id(p): p for part in parts for p in part.parameters() if p.requires_grad}.values())


def _embed_image(vlm: Any, path: Path, preprocess: Preprocess, tile: int, config: AlignConfig) -> Tensor:
    """Visual tokens (N, E) of an image: its UniRes grids, row by row, each like a frame of a video."""
    tiles = unires_tiles(open_image(path), tile=tile, rule=config.grid_rule)
    tower = vlm.model.vision_tower
    pixels = preprocess(tiles).to(vlm.device, tower.dtype)
    with torch.set_grad_enabled(config.tower_lr > 0):
        features = frame_features(vlm, pixels)
    return embed_frames(vlm, features)


def group_by_length(
    samples: Sequence[tuple[Conversation, TokenSequence]], micro_tokens: int
) -> list[list[tuple[Conversation, TokenSequence]]]:
    """Micro-batches of samples of like length, each at most `micro_tokens` after padding (or one sample alone)."""
    groups: list[list[tuple[Conversation, TokenSequence]]] = []
    for sample in sorted(samples, key=lambda s: len(s[1].ids), reverse=True):
        widest = len(groups[-1][0][1].ids) if groups else 0
        if groups and widest * (len(groups[-1]) + 1) <= micro_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups


def pad(sequences: Sequence[TokenSequence], pad_id: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask (B, L), padded on the right; padding is never counted."""
    width = max(len(s.ids) for s in sequences)
    ids = torch.tensor([s.ids + [pad_id] * (width - len(s.ids)) for s in sequences])
    labels = torch.tensor([s.labels + [IGNORED] * (width - len(s.labels)) for s in sequences])
    mask = torch.tensor([[True] * len(s.ids) + [False] * (width - len(s.ids)) for s in sequences])
    return ids.to(device), labels.to(device), mask.to(device)
