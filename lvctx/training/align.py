"""Align a language model with a vision tower on images and videos: first the projector, then all of it (or LoRA).

LongVA section 3.2 and LLaVA-1.6: stage `projector` trains only the MLP on caption pairs; stage `full` trains
projector, language model and tower on instructions; stage `dpo` on preferences between answers (`lvctx.training.dpo`).
The model encodes a grid of an image like a frame of a video.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lvctx.artifacts.stored_tensors import into_memory
from lvctx.data.hub import hub_datasets
from lvctx.data.packed_chat import ChatRows
from lvctx.errors import InputError, UsageError
from lvctx.models.adapter import load_adapter, longest_sample
from lvctx.models.image_processing import Preprocess
from lvctx.models.loading import context_length, load_model, load_tokenizer, trained_length
from lvctx.models.lora import ATTENTION, Gather, add_lora
from lvctx.models.loss import IGNORED
from lvctx.models.saving import model_files
from lvctx.models.side_files import write_side_files
from lvctx.models.vision_encoder import load_vision_model
from lvctx.models.vlm_assembly import assemble, newline_id, save_vlm
from lvctx.parallel.context import ParallelContext
from lvctx.training.align_job import AlignJob
from lvctx.training.batching import Forward, LossFn, Sample, answer_loss, pack_samples, skip_positions
from lvctx.training.parallel_config import ParallelConfig
from lvctx.training.row_order import indices
from lvctx.training.schedule import Schedule
from lvctx.training.task import ParameterGroup, TrainableModel, TrainConfig, TrainingTask


class AlignTask(TrainingTask[Sequence[Sample]]):
    """Cross-entropy of the answers; a micro-batch holds samples that share a forward pass."""

    schedule: Schedule = "cosine"

    def __init__(self, job: AlignJob) -> None:
        self.job, self.config, self.provenance = job, job.config, job.provenance
        self.inputs = [path for path in (job.lm, job.tower, job.init) if path]
        self.datasets = hub_datasets([job.config.data])
        self.is_packed = isinstance(job.rows, ChatRows)
        if isinstance(job.rows, ChatRows):
            self.inputs.append(job.config.data)
            self.datasets = job.rows.manifest.get("datasets", ())
        assert job.config.steps is not None
        self.train_config = TrainConfig(
            steps=job.config.steps,
            schedule=self.schedule,
            warmup=job.config.warmup,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        )
        self.loss_fn: LossFn[tuple[Tensor, int]] = answer_loss

    def load(self, device: str) -> TrainableModel:
        """The VLM, from one directory or assembled from a language model and a tower."""
        job = self.job
        self.tokenizer = load_tokenizer(job.text_source)
        if job.init is not None:
            vlm = load_model(job.init, device=device)
        else:
            lm = load_model(job.text_source, device=device)
            tower = load_vision_model(job.vision_source, dtype=lm.dtype, device=device)
            vlm = assemble(lm, tower, self.tokenizer, where=job.text_source, seed=self.config.seed)
        self.encoding = job.encoding(vlm.config.vision_config)
        self.encoding.write_to(vlm.config)
        groups, lora = _freeze(vlm, job)
        for adapter in self.config.adapter:
            load_adapter(adapter, vlm, lora)
        return TrainableModel(model=vlm, groups=groups, decoder=vlm.model.language_model, lora=lora)

    def build(self, trainable: TrainableModel, context: ParallelContext, parallel: ParallelConfig) -> nn.Module:
        """The VLM with its loss."""
        if context.cp > 1 and self.config.stage == "dpo":
            raise UsageError("--cp is not supported for --stage dpo: processes do not share an answer", fix="drop it")
        self.context, self.micro_tokens = context, parallel.forward_tokens
        self.positions = context_length(trainable.model.config)
        self.forward = Forward(
            trainable.model,
            encoding=self.encoding,
            preprocess=Preprocess.from_directory(self.job.vision_source),
            newline=newline_id(self.tokenizer),
            tower_grad=bool(self.config.tower_lr),
            device=context.device,
            pose=self.config.pose,
            sampling=self.job.sampling,
            ring=context.ring,
            recompute=self.is_packed and parallel.checkpoint_activations != "none",
        )
        return self.forward

    def sample(self, number: int) -> Sample:
        """A row of the data, encoded."""
        return self.job.sample(number, self.tokenizer, self.encoding)

    def sample_numbers(self, step: int) -> list[int]:
        """Rows of the data that a step uses."""
        assert self.config.batch is not None
        return indices(step, batch=self.config.batch, samples=len(self.job.rows), seed=self.config.seed)

    def batches(self, step: int) -> list[list[Sample]]:
        """Samples of a step, packed. Raises InputError if truncation removed all answers."""
        samples = [self.sample(number) for number in self.sample_numbers(step)]
        if self.config.pose:
            rngs = [np.random.default_rng([self.config.seed, step, sample.number]) for sample in samples]
            samples = [skip_positions(s, self.positions, rng) for s, rng in zip(samples, rngs, strict=True)]
        if all(label == IGNORED for sample in samples for s in sample.sequences for label in s.labels):
            fix = "run pack-chat again" if self.is_packed else "raise --max-length"
            raise InputError("no token of an answer is left to train on", where=samples[0].where, fix=fix)
        return pack_samples(samples, self.micro_tokens)

    def loss(self, micro: Sequence[Sample]) -> tuple[Tensor, int]:
        """`loss_fn` of a micro-batch."""
        total, count = self.forward(micro, self.loss_fn)
        return total, count

    def describe(self, micro: Sequence[Sample]) -> str:
        """Files and rows of the samples."""
        return ", ".join(sample.where for sample in micro)

    def longest(self, micro: Sequence[Sample]) -> int:
        """Tokens of the longest sample."""
        return max(sample.longest for sample in micro)

    def longest_sample(self, metrics: Sequence[dict[str, Any]]) -> int:
        """Tokens of the longest sample of this run and of the runs that it starts from."""
        sources = [*self.config.adapter, *([self.job.init] if self.job.init else [])]
        lengths = [longest_sample(path) for path in sources]
        return max([*lengths, *(row.get("longest_sample", 0) for row in metrics)], default=0)

    def save(
        self, model: Any, out: Path, metrics: Sequence[dict[str, Any]], gather: Gather
    ) -> tuple[list[str], dict[str, Any]]:
        """Write the VLM, its tokenizer and processor, and side files for other runtimes."""
        save_vlm(model, self.tokenizer, self.job.vision_source, out, dtype=model.config.dtype, gather=gather)
        write_side_files(out)
        return model_files(out), {
            "context": context_length(model.config),
            "trained_length": trained_length(self.job.text_source),
            "longest_sample": self.longest_sample(metrics),
        }


def _freeze(vlm: Any, job: AlignJob) -> tuple[list[ParameterGroup], Any]:
    """Freeze the stage's frozen parts; returns the trained groups, and the LoRA wrapper if there is one."""
    config, groups, lora = job.config, [], None
    assert config.lr is not None
    vlm.requires_grad_(False)
    projector = into_memory(vlm.model.multi_modal_projector).float()
    if config.projector_lr:
        modules = [projector.requires_grad_(True)]
        groups.append(ParameterGroup(name="projector", modules=modules, lr=config.projector_lr))
    if config.stage == "projector":
        return groups, None
    if config.lora:
        lora = add_lora(vlm.model.language_model, rank=config.lora, targets=ATTENTION, seed=config.seed)
        groups.append(ParameterGroup(name="lm", modules=[lora], lr=config.lr))
    else:
        modules = [part.requires_grad_(True) for part in (vlm.model.language_model, vlm.lm_head)]
        groups.append(ParameterGroup(name="lm", modules=modules, lr=config.lr))
    if config.tower_lr:
        modules = [vlm.model.vision_tower.requires_grad_(True)]
        groups.append(ParameterGroup(name="tower", modules=modules, lr=config.tower_lr))
    return groups, lora
