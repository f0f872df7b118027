"""A checked alignment: options, models and data are checked before any weight is loaded."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.sniff import sniff
from lvctx.artifacts.store import fingerprint
from lvctx.config import hashed_fields
from lvctx.data.chat_encoding import encode_conversation, encode_plain
from lvctx.data.conversations import Conversation, read_conversations, read_pairs
from lvctx.data.hub import hub_commit
from lvctx.data.packed_chat import ChatRows
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import VLM_TYPE, load_config, load_tokenizer, refuse_quantized, resolve_model
from lvctx.models.unires import MAX_GRIDS, image_max_grids
from lvctx.models.vlm_assembly import add_visual_tokens, image_grid, image_rule
from lvctx.parallel.hf_attention import is_plain
from lvctx.training.align_config import AlignConfig, Template
from lvctx.training.batching import Sample, encode_sample
from lvctx.training.packed_align import check_packed, media_files, packed_facts, packed_sample
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.haystack_files import list_images
from lvctx.vlm.image_tiling import ImageEncoding


@dataclass(frozen=True, kw_only=True)
class AlignJob:
    """A checked run."""

    config: AlignConfig
    """The configuration with every default resolved."""
    lm: Path | None
    """Resolved directory of the language model to start from, used with `tower`."""
    tower: Path | None
    """Resolved directory of the vision tower to start from."""
    init: Path | None
    """Resolved directory of the VLM to start from, instead of `lm` and `tower`."""
    rows: Sequence[tuple[Conversation, ...]] | ChatRows
    """Training samples: a conversation, or two with the preferred answer in the first; or packed rows of samples."""
    provenance: Provenance
    """What identifies the run."""

    @property
    def text_source(self) -> Path:
        """Directory with the tokenizer and the language model."""
        path = self.init or self.lm
        assert path is not None
        return path

    @property
    def vision_source(self) -> Path:
        """Directory with the tower and the image preprocessing."""
        path = self.init or self.tower
        assert path is not None
        return path

    def encoding(self, vision_config: Any) -> ImageEncoding:
        """The image encoding for this tower."""
        config = self.config
        assert config.image_encoding is not None
        assert config.unires_rule is not None
        assert config.max_grids is not None
        return ImageEncoding.of(
            vision_config, grid=config.image_encoding, rule=config.unires_rule, max_grids=config.max_grids
        )

    def sample(self, number: int, tokenizer: Any, encoding: ImageEncoding) -> Sample:
        """A row of the data, encoded."""
        config = self.config
        if isinstance(self.rows, ChatRows):
            return packed_sample(number, self.rows, config.images)
        assert config.max_length is not None
        return encode_sample(
            number,
            self.rows[number],
            tokenizer,
            encoding,
            max_length=config.max_length,
            template=config.template,
            markup=config.loss_on == "markup",
            sampling=self.sampling,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What it is trained on, and its resolved configuration, for the output row."""
        size = packed_facts(self.rows) if isinstance(self.rows, ChatRows) else {"samples": len(self.rows)}
        return {**size, **hashed_fields(self.config)}

    @property
    def sampling(self) -> VideoSampling | None:
        """How the data's videos are sampled; None if there are none."""
        if self.config.frames is None and self.config.fps is None:
            return None
        return VideoSampling(frames=self.config.frames, fps=self.config.fps)


@dataclass(frozen=True, kw_only=True)
class StageDefaults:
    """Default settings of a stage."""

    lr: float
    batch: int
    epochs: float
    tower_lr: float


DEFAULTS = {
    "projector": StageDefaults(lr=1e-3, batch=128, epochs=1, tower_lr=0.0),
    "full": StageDefaults(lr=1e-5, batch=32, epochs=1, tower_lr=2e-6),
    "dpo": StageDefaults(lr=5e-7, batch=128, epochs=3, tower_lr=0.0),
}
"""LongVA's."""
BETA = 0.1
"""LLaVA-Hound-DPO's."""
MAX_LENGTH = 32_768
"""Maximum tokens of a sample."""
VIDEO_FRAMES = 10
"""Frames of a video in LongVA-DPO's code."""


def resolve_align(config: AlignConfig) -> AlignJob:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError; loads no weights."""
    _check_options(config)
    sources = {"lm": config.lm, "tower": config.tower, "init": config.init}
    paths = {role: resolve_model(source) for role, source in sources.items() if source}
    text_source = paths.get("init") or paths["lm"]
    model_config = load_config(text_source)
    if "init" in paths and model_config.model_type != VLM_TYPE:
        raise UsageError(f"--init {config.init} is not a VLM", fix="start with --lm and --tower")
    refuse_quantized(model_config, text_source)
    if config.pose and not is_plain(model_config.get_text_config()):
        raise InputError("its attention has a sliding window or latent keys", where=text_source, fix="drop --pose")
    rows: Sequence[tuple[Conversation, ...]] | ChatRows
    if sniff(config.data).name == "chat":
        rows = check_packed(config, paths.get("init"))
        files = media_files(rows, config.images)
        resolved = replace(config, batch=config.batch or 1, max_length=rows.longest)
    else:
        rows = _read_rows(config)
        _check_template(rows, text_source, config.template, new="lm" in paths)
        files = [file for row in rows for file in row[0].files]
        resolved = replace(config, max_length=config.max_length or MAX_LENGTH)
        has_videos = any(file.kind == "video" for file in files)
        if not has_videos and (config.frames is not None or config.fps is not None):
            raise UsageError("--frames and --fps are for videos, and the data have none", fix="drop them")
        if has_videos and config.frames is None and config.fps is None:
            resolved = replace(resolved, frames=VIDEO_FRAMES)
    resolved = _resolve_defaults(resolved, len(rows), model_config if "init" in paths else None)
    inputs = {role: fingerprint(path) for role, path in paths.items()}
    inputs["data"] = fingerprint(config.data) if config.data.exists() else hub_commit(str(config.data))
    inputs["images"] = _hash_images((file.path for file in files), config.images)
    inputs |= {f"adapter-{i}": fingerprint(adapter) for i, adapter in enumerate(config.adapter)}
    provenance = Provenance(
        schema=schemas.MODEL, command="align", config=hashed_fields(resolved), inputs=inputs, seed=config.seed
    )
    return AlignJob(
        config=resolved,
        lm=paths.get("lm"),
        tower=paths.get("tower"),
        init=paths.get("init"),
        rows=rows,
        provenance=provenance,
    )


def _read_rows(config: AlignConfig) -> Sequence[tuple[Conversation, ...]]:
    if config.stage == "dpo":
        return read_pairs(config.data, config.images)
    videos = config.stage != "projector"
    return [(conversation,) for conversation in read_conversations(config.data, config.images, videos=videos)]


def _check_options(config: AlignConfig) -> None:
    """Raise UsageError for options that contradict each other."""
    stage, init = config.stage, config.init
    if (init is None) == (config.lm is None and config.tower is None):
        raise UsageError("give either --init, or --lm and --tower")
    if init is None and (config.lm is None or config.tower is None):
        raise UsageError("--lm and --tower have to be given together")
    if init is None and stage == "dpo":
        raise UsageError("--stage dpo starts from an aligned model", fix="give --init")
    if stage != "dpo" and config.beta is not None:
        raise UsageError("--beta needs --stage dpo")
    if stage == "dpo" and config.pose:
        raise UsageError("--pose is for the stages projector and full", fix="drop it")
    if stage == "dpo" and config.loss_on == "markup":
        raise UsageError("--loss-on markup is for the stages projector and full: both answers have it", fix="drop it")
    if stage == "dpo" and config.template == "plain":
        raise UsageError("--template plain has no question to prefer an answer to", fix="drop it")
    if stage == "projector" and config.lora:
        raise UsageError("--lora trains the language model and needs --stage full or dpo")
    if config.frames is not None and config.fps is not None:
        raise UsageError("give either --frames or --fps, not both")
    if config.steps is not None and config.epochs is not None:
        raise UsageError("give either --steps or --epochs, not both")
    if config.adapter and not config.lora:
        raise UsageError("--adapter is a LoRA and needs --lora")
    if stage == "projector" and config.projector_lr is not None:
        raise UsageError("--projector-lr needs --stage full or dpo", fix="use --lr for the projector")
    tower_lr = DEFAULTS[stage].tower_lr if config.tower_lr is None else config.tower_lr
    if config.lr == 0 and (stage == "projector" or not (config.projector_lr or tower_lr)):
        raise UsageError("every learning rate is 0, so nothing would be trained", fix="raise --lr")


def _resolve_defaults(config: AlignConfig, samples: int, init: Any) -> AlignConfig:
    """`config` without None; `init` is the configuration of the VLM to start from, if there is one."""
    defaults = DEFAULTS[config.stage]
    batch = config.batch or defaults.batch
    lr = defaults.lr if config.lr is None else config.lr
    tower_lr = config.tower_lr
    if config.stage == "projector" or tower_lr is None:
        tower_lr = defaults.tower_lr
    return replace(
        config,
        image_encoding=config.image_encoding or (image_grid(init) if init is not None else "unires"),
        unires_rule=config.unires_rule or (image_rule(init) if init is not None else "code"),
        max_grids=config.max_grids or (image_max_grids(init) if init is not None else MAX_GRIDS),
        steps=config.steps or max(1, round((config.epochs or defaults.epochs) * samples / batch)),
        batch=batch,
        lr=lr,
        projector_lr=lr if config.projector_lr is None else config.projector_lr,
        tower_lr=tower_lr,
        beta=(BETA if config.beta is None else config.beta) if config.stage == "dpo" else 0.0,
    )


def _hash_images(media: Iterable[Path], images: Path) -> str:
    """SHA-256 of the names, below `images`, and sizes of all image and video files that the rows use."""
    digest = hashlib.sha256()
    for path in sorted(file for one in set(media) for file in (list_images(one) if one.is_dir() else [one])):
        name = path.relative_to(images) if path.is_relative_to(images) else path
        digest.update(f"{name}\0{path.stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _check_template(rows: Sequence[tuple[Conversation, ...]], path: Path, template: Template, *, new: bool) -> None:
    """Raise InputError if the template cannot render a row; one row per sequence of roles and images is checked."""
    tokenizer = load_tokenizer(path)
    if new:
        add_visual_tokens(tokenizer, path)
    roles = {
        (tuple(turn.role for turn in conversation.turns), len(conversation.media)): (conversation, len(row) > 1)
        for row in reversed(rows)
        for conversation in row
    }
    for conversation, last_only in roles.values():
        if template == "plain":
            encode_plain(conversation, tokenizer, lambda image: 1)
            continue
        encode_conversation(conversation, tokenizer, lambda image: 1, last_only=last_only)
