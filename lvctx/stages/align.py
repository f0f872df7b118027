"""Teach a language model to see, with single images only: first the projector, then the whole model (or LoRA).

LongVA section 3.2 and LLaVA-1.6: stage `projector` trains the MLP alone on caption pairs; stage `full` trains
projector, language model and tower on instructions; stage `dpo` on preferences between answers. A grid of an image
looks to the model like a frame of a video.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import MANIFEST, is_finished, write_manifest
from lvctx.dist import checkpoint
from lvctx.dist.context import ParallelContext, open_context
from lvctx.dist.fsdp import gather_into, shard_model
from lvctx.errors import InputError
from lvctx.model.adapter import load_adapter, longest_sample, save_adapter
from lvctx.model.export import model_files
from lvctx.model.load import context_length, load_model, load_tokenizer, trained_length
from lvctx.model.lora import ATTENTION, add_lora, merge_lora
from lvctx.model.loss import IGNORED
from lvctx.model.vlm import assemble, newline_id, save_vlm
from lvctx.stages.align_plan import AlignConfig, Plan
from lvctx.stages.side_files import write_side_files
from lvctx.train.activations import checkpoint_layers
from lvctx.train.data import indices
from lvctx.train.loop import Group, TrainConfig, train
from lvctx.train.micro import Forward, Sample, answer_loss, encode_sample, pack_samples, spread
from lvctx.train.preference import REFERENCE, Preference, compute_reference
from lvctx.vision.images import Preprocess
from lvctx.vision.tower import load_vision_model


def run_align(
    plan: Plan,
    out: Path,
    *,
    resume: str,
    force: bool,
    micro_tokens: int,
    checkpoint_activations: bool,
    device: str,
    report: Callable[[int, int, str], None],
) -> None:
    """Train (or resume) and write the aligned VLM to `out`; nothing to do if it stands finished.

    `micro_tokens` bounds the tokens of one forward, and `checkpoint_activations` recomputes the language model's layers
    in the backward pass; both change speed and memory, not the result's definition.
    """
    if is_finished(out, plan.provenance, resume=resume, force=force):
        return
    with open_context(device=device) as world, ExitStack() as held:
        if world.rank == 0:
            held.enter_context(only_writer(out))
            if force or resume == "never":
                checkpoint.remove(out)
                (out / MANIFEST).unlink(missing_ok=True)
                (out / REFERENCE).unlink(missing_ok=True)
        world.barrier()
        trained = _train(
            plan,
            out,
            micro_tokens=micro_tokens,
            checkpoint_activations=checkpoint_activations,
            world=world,
            report=report,
        )
        if world.rank == 0:
            _save(plan, out, *trained)
        world.barrier()


def _save(plan: Plan, out: Path, vlm: Any, tokenizer: Any, wrapped: Any, longest: int) -> None:
    """Write the trained VLM, and where there is LoRA the adapter."""
    if wrapped is not None:
        save_adapter(out, vlm, wrapped, plan.provenance, longest=longest)
        vlm.model.language_model = merge_lora(wrapped)
    vlm.to(vlm.config.dtype)
    pixels_from, source = plan.init or plan.tower, plan.init or plan.lm
    assert pixels_from is not None
    assert source is not None
    save_vlm(vlm, tokenizer, pixels_from, out)
    write_side_files(out)
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
        return load_model(plan.init, device=device), load_tokenizer(plan.init), plan.init
    assert plan.lm is not None
    assert plan.tower is not None
    lm = load_model(plan.lm)
    tokenizer = load_tokenizer(plan.lm)
    tower = load_vision_model(plan.tower, dtype=lm.dtype)
    vlm = assemble(lm, tower, tokenizer, where=plan.lm, seed=plan.config.seed)
    return vlm.to(device), tokenizer, plan.tower


def _train(
    plan: Plan,
    out: Path,
    *,
    micro_tokens: int,
    checkpoint_activations: bool,
    world: ParallelContext,
    report: Callable[[int, int, str], None],
) -> tuple[Any, Any, Any, int]:
    """The trained VLM (on rank 0 if there are several), its tokenizer, its LoRA wrapper, and the longest sample."""
    config = plan.config
    device = world.device
    vlm, tokenizer, pixels_from = _load(plan, "cpu" if world.mesh is not None else device)
    encoding = config.encoding(vlm.config.vision_config)
    encoding.write_to(vlm.config)
    trained, wrapped = _trained(vlm, config)
    for adapter in plan.adapters:
        load_adapter(adapter, vlm, wrapped)
    if checkpoint_activations:
        checkpoint_layers(vlm.model.language_model, offload=False)

    def sample(number: int) -> Sample:
        return encode_sample(number, plan.rows[number], tokenizer, encoding, max_length=config.max_length)

    def chosen(step: int) -> list[int]:
        return indices(step, batch=config.batch, samples=len(plan.rows), seed=config.seed)

    def batch(step: int) -> list[list[Sample]]:
        samples = [sample(number) for number in chosen(step)]
        if config.pose:
            context = context_length(vlm.config)
            samples = [spread(one, context, np.random.default_rng([config.seed, step, one.number])) for one in samples]
        if all(label == IGNORED for one in samples for s in one.sequences for label in s.labels):
            raise InputError("a whole step without an answer left", where=samples[0].where, fix="raise --max-length")
        return pack_samples(samples, micro_tokens)

    forward = Forward(
        vlm,
        encoding=encoding,
        preprocess=Preprocess.from_directory(pixels_from),
        newline=newline_id(tokenizer),
        tower_grad=config.tower_lr > 0,
        device=device,
        pose=config.pose,
    )
    shard_model(forward, vlm.model.language_model.get_submodule("layers"), world)
    groups = [Group(name=name, parameters=_parameters(parts), lr=lr) for name, parts, lr in trained]
    loss: Callable[[Any], tuple[Tensor, int]] = partial(forward, judge=answer_loss)
    if config.stage == "dpo":
        reference = compute_reference(
            {number for step in range(config.steps) for number in chosen(step)},
            sample=sample,
            forward=forward,
            path=out / REFERENCE,
            made_of=_reference_made_of(plan),
            micro_tokens=micro_tokens,
            world=world,
            report=report,
        )
        loss = partial(forward, judge=Preference(reference, config.beta))
    rows = train(
        groups=groups,
        batch=batch,
        loss=loss,
        config=TrainConfig(
            steps=config.steps,
            schedule="linear" if config.stage == "dpo" else "cosine",
            warmup=config.warmup,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        ),
        out=out,
        run=plan.provenance,
        report=report,
        world=world,
        name=lambda micro: ", ".join(one.where for one in micro),
        longest=lambda micro: max(one.longest for one in micro),
    )
    before = [longest_sample(path) for path in (*plan.adapters, plan.init) if path is not None]
    longest = max([*before, *(row.get("longest_sample", 0) for row in rows)], default=0)
    if world.mesh is not None:
        twin = _load(plan, "cpu")[0] if world.rank == 0 else None
        wrapped = None
        if twin is not None:
            encoding.write_to(twin.config)
            wrapped = _trained(twin, config)[1]
        gather_into(twin, vlm)
        vlm = twin
    return vlm, tokenizer, wrapped, longest


def _reference_made_of(plan: Plan) -> dict[str, Any]:
    """What decides the starting model's log-probabilities."""
    encoding = {key: getattr(plan.config, key) for key in ("grid", "grid_rule", "max_grids", "max_length")}
    return {**{name: value[:16] for name, value in plan.provenance.inputs.items()}, **encoding}


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
