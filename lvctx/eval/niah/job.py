"""Plan a needle test: check everything that can be checked without the model's weights."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvctx.artifacts import schemas
from lvctx.artifacts.result_log import short_hash
from lvctx.artifacts.store import fingerprint
from lvctx.cost import CostMeter
from lvctx.errors import UsageError
from lvctx.eval.niah.frame_needles import FrameNeedles
from lvctx.eval.niah.needle_sets import find_needles
from lvctx.eval.niah.needle_task import Cell, NeedleTask
from lvctx.eval.niah.niah_config import NiahConfig, Scoring, TextNiahConfig, VideoNiahConfig
from lvctx.eval.niah.ruler_task import RulerTask
from lvctx.eval.niah.ruler_texts import CommonWords, FrequentWords, QuestionDocuments
from lvctx.eval.niah.text_needles import read_haystack
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.eval.niah.video_task import VideoNeedleTask
from lvctx.inference.engine_config import CachePlacement
from lvctx.inference.prefix_scorer import common_prefix, walk_order
from lvctx.models.adapter import longest_sample
from lvctx.models.loading import (
    context_length,
    effective_dtype,
    load_config,
    load_tokenizer,
    resolve_model,
    trained_length,
)
from lvctx.rope.scaling import resolve_scaling
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.base import VLM, VisualTokens, sequential_positions


@dataclass(frozen=True, kw_only=True)
class NiahJob:
    """A checked test: everything except the model's weights."""

    config: NiahConfig
    """The given configuration, with at most one RoPE."""
    path: Path
    """Resolved model directory."""
    tokenizer: Any
    """The model's."""
    task: NeedleTask
    """Cells and their sequences."""
    scoring: Scoring
    """Resolved."""
    dtype: str
    """Data type of the weights in memory; `auto` is the checkpoint's own."""
    kv_cache: CachePlacement
    """Placement of the KV cache."""
    cells: list[Cell]
    """Cells in the order of the walk."""
    visual: VisualTokens | None
    """The haystack's frames (video)."""
    images: tuple[Any, ...]
    """The images inserted among them."""
    meter: CostMeter
    """Adds up what a cell costs; the first pays for reading and encoding the haystack."""
    run_facts: dict[str, Any]
    """Facts of the run in every row; their `run` identifies everything that decides a result."""

    def key(self, cell: Cell) -> str:
        """Key of a cell's result in this run: sixteen hex digits."""
        return short_hash({"run": self.run_facts["run"], "cell": asdict(cell)})

    def last_position(self, ids_L: np.ndarray) -> int:
        """The largest position of a sequence: for M-RoPE far smaller than its number of tokens."""
        return int((self.visual.positions if self.visual else sequential_positions)(ids_L, 0).max())

    def model_config(self) -> Any:
        """The configuration that the model is evaluated with."""
        config = load_config(self.path)
        for scheme, number in self.config.rope:
            text, length = config.get_text_config(), context_length(config)
            theta, factor = (number, None) if scheme == "theta" else (None, number)
            chosen = resolve_scaling(text, scheme=scheme, theta=theta, factor=factor, context=length, seq_len=0)
            text.rope_parameters = chosen.rope_parameters
        return config

    def costs(self, cp: int = 1) -> dict[str, Any]:
        """Costs for a dry run: the cells, the tokens to compute, and a rank's bytes of weights and cache.

        `cp` ranks share a sequence: the cache is divided among them, and each has all weights.
        """
        config = load_config(self.path)
        text = config.get_text_config()
        # One sequence at a time, since all sequences of a large grid are gigabytes.
        lengths = [len(self.task.sequence(cell)[0]) for cell in self.cells]
        pairs = itertools.pairwise(self.task.sequence(cell)[0] for cell in self.cells)
        shared = sum(common_prefix(a, b) for a, b in pairs)
        tokens, longest = sum(lengths), max(lengths)
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = torch.finfo(getattr(torch, effective_dtype(config, self.dtype), torch.float32)).bits // 8
        channel = heads + 4 if self.kv_cache == "int8" else heads * width  # a float32 scale for each head and token
        return {
            "cells": len(self.cells),
            "tokens": tokens,
            "tokens_once": tokens - shared,
            "longest_tokens": longest,
            "last_position": max(self.last_position(self.task.sequence(cell)[0]) for cell in self.cells),
            "context": context_length(config),
            "weight_bytes": sum(file.stat().st_size for file in self.path.glob("*.safetensors")),
            "cache_bytes": 2 * text.num_hidden_layers * text.num_key_value_heads * channel * -(-longest // cp),
            "kv_cache": self.kv_cache,
            "cp": cp,
        }


TextTasks = TextNeedleTask | RulerTask


def build_text_task(config: TextNiahConfig, tokenizer: Any) -> TextTasks:
    """The task of a configuration. Raises InputError for a haystack that cannot be read, UsageError for the number."""
    if config.task == "qa":
        if len(config.haystack) != 1:
            raise UsageError("--task qa takes questions and documents from one file", fix="give --haystack once")
        return RulerTask(tokenizer, QuestionDocuments(config.haystack[0], config.seed), task=config.task)
    if config.task == "frequent-words":
        return RulerTask(tokenizer, FrequentWords(config.seed), task=config.task)
    haystack = read_haystack(config.haystack)
    if config.task == "common-words":
        return RulerTask(tokenizer, CommonWords(haystack, config.seed), task=config.task)
    return TextNeedleTask(
        tokenizer,
        haystack,
        distractors=config.distractors,
        seed=config.seed,
        task=config.task,
        count=config.count,
        nested=config.depths.nested,
        loop=config.loop,
        city=config.city,
        haystack_only=config.length_of == "haystack",
    )


def plan_text(config: TextNiahConfig, *, dtype: str = "auto", kv_cache: CachePlacement = "device") -> NiahJob:
    """Check everything that can be checked without loading the model's weights.

    Raises UsageError for values out of their range, InputError for inputs that do not exist or do not match.
    """
    path = resolve_model(config.model)
    tokenizer = load_tokenizer(path)
    task = build_text_task(config, tokenizer)
    meter = CostMeter(("prefill", "generate"))
    return _plan(config, path, tokenizer, task, dtype=dtype, kv_cache=kv_cache, meter=meter)


def plan_video(
    config: VideoNiahConfig,
    vlm: VLM,
    sampling: VideoSampling,
    *,
    dtype: str = "auto",
    kv_cache: CachePlacement = "device",
) -> NiahJob:
    """The same for video."""
    tokenizer = load_tokenizer(vlm.path)
    haystack = vlm.haystack(config.haystack, sampling, as_images=config.as_images)
    needles = find_needles(config, haystack.image_size)
    seconds = haystack.seconds[: max(config.lengths)]  # the others are not used
    images = tuple(needle.image for needle in (*needles.needles, *needles.distractors))
    visual = haystack.tokens(len(seconds), images)
    task = VideoNeedleTask(
        tokenizer,
        needles,
        visual,
        seconds=seconds,
        question=config.question,
        tolerance=config.tolerance,
        nested=config.depths.nested,
        loop=config.loop,
        seed=config.seed,
    )
    return _plan(
        config,
        vlm.path,
        tokenizer,
        task,
        dtype=dtype,
        kv_cache=kv_cache,
        meter=vlm.meter,
        visual=visual,
        images=images,
    )


def input_facts(config: NiahConfig, task: NeedleTask | FrameNeedles) -> dict[str, Any]:
    """Where a run's haystack and needles come from, for its rows: a report shows their images where they still exist.

    They decide nothing: the hashes of the contents do, in `made_of`.
    """
    facts: dict[str, Any] = {"haystack": [str(path) for path in config.haystack]}
    if isinstance(config, VideoNiahConfig) and isinstance(task, FrameNeedles):
        facts["needles"] = {
            "source": config.needles,
            "size": task.needles[0].image.width,
            **{name: getattr(config, name) for name in ("distractors", "question", "count", "needle_frames")},
        }
    return facts


def _plan(
    config: NiahConfig,
    path: Path,
    tokenizer: Any,
    task: NeedleTask,
    *,
    dtype: str,
    kv_cache: CachePlacement,
    meter: CostMeter,
    visual: VisualTokens | None = None,
    images: Sequence[Any] = (),
) -> NiahJob:
    scoring: Scoring = config.scoring or ("forced" if task.can_force else "generate")
    if scoring != "generate" and not task.can_force:
        raise UsageError(f"--scoring {scoring}: this question needs generated answers", fix="--scoring generate")
    cells = task.cells(config.lengths, config.depths.values, config.trials)
    if not cells:
        raise UsageError("no depth is within any length")
    cells = [cells[i] for i in walk_order(task.sequence(cell)[0] for cell in cells)]
    made_of = {
        "model": fingerprint(path)[:16],
        "haystack": short_hash([fingerprint(p) for p in config.haystack]),
        "prompt": short_hash(task.prompt()),
        "scoring": scoring,
        "seed": config.seed,
        "dtype": effective_dtype(load_config(path), dtype),
        "kv_cache": "int8" if kv_cache == "int8" else "exact",
        "rope": config.rope,
    }
    run_facts = {
        "schema": schemas.NIAH,
        "run": short_hash(made_of),
        "model": config.model,
        "modality": task.modality,
        "visual": visual.facts if visual else None,
        "made_of": made_of,
        "kv_cache": kv_cache,
        **input_facts(config, task),
        "chance": task.chance,
        "trained_length": config.training_length or trained_length(path),
        "longest_sample": longest_sample(path),
    }
    job = NiahJob(
        config=config,
        path=path,
        tokenizer=tokenizer,
        task=task,
        scoring=scoring,
        dtype=dtype,
        kv_cache=kv_cache,
        cells=cells,
        visual=visual,
        images=tuple(images),
        meter=meter,
        run_facts=run_facts,
    )
    job.model_config()  # raises an error for an unsupported RoPE
    return job
