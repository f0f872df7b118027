"""What an alignment is asked to do: flags, models and data checked before any weight is loaded."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import Provenance
from lvctx.artifacts.store import fingerprint
from lvctx.dist.attention import is_plain
from lvctx.errors import InputError, UsageError
from lvctx.model.load import VLM_TYPE, load_config, load_tokenizer, refuse_quantized, resolve_model
from lvctx.model.loss import IGNORED
from lvctx.model.vlm import VIDEO_TOKEN, Grid, add_visual_tokens, image_grid, image_rule
from lvctx.text.conversations import Conversation, read_conversations, read_pairs
from lvctx.text.hub import hub_commit
from lvctx.train.chat import encode_conversation
from lvctx.train.micro import encode_sample
from lvctx.vision.grids import MAX_GRIDS, GridRule, MaxGrids, image_max_grids
from lvctx.vision.tower import TowerFiles
from lvctx.vlm.image_tiling import ImageEncoding

Stage = Literal["projector", "full", "dpo"]


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """What decides an aligned model, besides models and data."""

    stage: Stage
    """`projector`: tower and language model frozen. `full`: all trained. `dpo`: as `full`, on preferences."""
    grid: Grid
    """How images become tokens; LongVA `unires`."""
    grid_rule: GridRule
    """UniRes as the released code (`code`) or as the paper's text (`paper`)."""
    max_grids: MaxGrids
    """UniRes's grids an image at most, LongVA 49; or an imported model's own list of grids."""
    steps: int
    """Optimizer steps."""
    batch: int
    """Samples a step; LongVA 128 (projector), 32 (full), 128 (dpo)."""
    lr: float
    """Peak rate; LongVA 1e-3 (projector), 1e-5 (full), 5e-7 (dpo)."""
    projector_lr: float
    """Peak rate of the projector: `lr` unless it has its own; 0 freezes it after stage `projector`."""
    tower_lr: float
    """Peak rate of the tower; LLaVA 2e-6 in stage `full`; 0 freezes it."""
    warmup: float
    """Fraction of the steps; LLaVA 0.03. Then cosine, in stage `dpo` linear."""
    lora: int
    """Rank of LoRA on the language model's attention after stage `projector`; 0 trains all its weights, as LongVA."""
    beta: float
    """How far preferences may lead away from the starting model; LLaVA-Hound-DPO 0.1, 0 in the other stages."""
    max_length: int
    """Tokens after which a sample is cut; LongVA 32,768."""
    pose: bool
    """Samples are cut in two and spread over all of the language model's context (PoSE); LongVA's language model
    learned every distance on text of full length."""
    seed: int
    """Order of the samples, projector's and LoRA's initialisation."""

    def encoding(self, vision_config: Any) -> ImageEncoding:
        """How images become tokens of this tower."""
        return ImageEncoding.of(vision_config, grid=self.grid, rule=self.grid_rule, max_grids=self.max_grids)


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
    """What earlier alignments trained (`lvctx.model.adapter`), to start from; the later wins."""
    rows: Sequence[tuple[Conversation, ...]]
    """Training samples: a conversation, or two of which the first has the preferred answer."""
    provenance: Provenance
    """What identifies the run."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a stage does unless told otherwise."""

    lr: float
    batch: int
    epochs: float
    tower_lr: float


DEFAULTS: dict[Stage, Defaults] = {
    "projector": Defaults(lr=1e-3, batch=128, epochs=1, tower_lr=0.0),
    "full": Defaults(lr=1e-5, batch=32, epochs=1, tower_lr=2e-6),
    "dpo": Defaults(lr=5e-7, batch=128, epochs=3, tower_lr=0.0),
}
"""LongVA's."""
BETA = 0.1
"""LLaVA-Hound-DPO's."""


def plan_align(
    *,
    stage: Stage,
    lm: str | None,
    tower: str | None,
    init: str | None,
    adapters: Sequence[Path],
    data: Path,
    images: Path,
    grid: Grid | None,
    grid_rule: GridRule | None,
    max_grids: int | None,
    steps: int | None,
    epochs: float | None,
    batch: int | None,
    lr: float | None,
    projector_lr: float | None,
    tower_lr: float | None,
    warmup: float,
    lora: int,
    beta: float | None,
    max_length: int,
    pose: bool,
    seed: int,
) -> Plan:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError; loads no weights."""
    if (init is None) == (lm is None and tower is None):
        raise UsageError("give either --init, or --lm and --tower")
    if init is None and (lm is None or tower is None):
        raise UsageError("--lm and --tower go together")
    if init is None and stage == "dpo":
        raise UsageError("--stage dpo goes on from an aligned model", fix="give --init")
    if stage != "dpo" and beta is not None:
        raise UsageError("--beta goes with --stage dpo")
    if stage == "dpo" and pose:
        raise UsageError("--pose is for the stages projector and full", fix="drop it")
    if stage == "projector" and lora:
        raise UsageError("--lora trains the language model: it goes with --stage full")
    if steps is not None and epochs is not None:
        raise UsageError("give --steps or --epochs, not both")
    if adapters and not lora:
        raise UsageError("--adapter holds a LoRA: it goes with --lora")
    if stage == "projector" and projector_lr is not None:
        raise UsageError("--projector-lr goes with --stage full", fix="--lr is the projector's rate here")
    usual = DEFAULTS[stage]
    if stage == "projector" or tower_lr is None:
        tower_lr = usual.tower_lr
    if lr == 0 and (stage == "projector" or not (projector_lr or tower_lr)):
        raise UsageError("every rate is 0: nothing would be trained", fix="raise --lr")
    paths = {k: resolve_model(v) for k, v in {"lm": lm, "tower": tower, "init": init}.items() if v}
    started = load_config(paths["init"]) if init is not None else None
    if started is not None and started.model_type != VLM_TYPE:
        raise UsageError(f"--init {init} is no VLM", fix="start with --lm and --tower")
    vlm_or_lm = started or load_config(paths["lm"])
    refuse_quantized(vlm_or_lm, paths.get("lm", paths.get("init")))
    if pose and not is_plain(vlm_or_lm.get_text_config()):
        raise InputError(
            "its attention has a sliding window or latent keys", where=paths.get("lm", init), fix="drop --pose"
        )
    rows: Sequence[tuple[Conversation, ...]]
    rows = read_pairs(data, images) if stage == "dpo" else [(c,) for c in read_conversations(data, images)]
    _check_template(rows, paths.get("init") or paths["lm"], new="lm" in paths)
    size = batch or usual.batch
    rate = usual.lr if lr is None else lr
    config = AlignConfig(
        stage=stage,
        grid=grid or (image_grid(started) if started is not None else "unires"),
        grid_rule=grid_rule or (image_rule(started) if started is not None else "code"),
        max_grids=max_grids or (image_max_grids(started) if started is not None else MAX_GRIDS),
        steps=steps or max(1, round((epochs or usual.epochs) * len(rows) / size)),
        batch=size,
        lr=rate,
        projector_lr=rate if projector_lr is None else projector_lr,
        tower_lr=tower_lr,
        warmup=warmup,
        lora=lora,
        beta=(BETA if beta is None else beta) if stage == "dpo" else 0.0,
        max_length=max_length,
        pose=pose,
        seed=seed,
    )
    pictures = hashlib.sha256()
    for image in sorted({i for row in rows for i in row[0].images}):
        named = image.relative_to(images) if image.is_relative_to(images) else image
        pictures.update(f"{named}\0{image.stat().st_size}\n".encode(errors="surrogateescape"))
    inputs = {k: fingerprint(p) for k, p in paths.items()}
    inputs |= {"data": fingerprint(data) if data.exists() else hub_commit(str(data)), "images": pictures.hexdigest()}
    inputs |= {f"adapter-{i}": fingerprint(adapter) for i, adapter in enumerate(adapters)}
    return Plan(
        config=config,
        lm=paths.get("lm"),
        tower=paths.get("tower"),
        init=paths.get("init"),
        adapters=tuple(adapters),
        rows=rows,
        provenance=Provenance(schema=schemas.MODEL, command="align", config=asdict(config), inputs=inputs, seed=seed),
    )


def _check_template(rows: Sequence[tuple[Conversation, ...]], path: Path, *, new: bool) -> None:
    """Raise InputError where the chat template cannot write a row; rows with the same roles are one to it."""
    tokenizer = load_tokenizer(path)
    if new:
        add_visual_tokens(tokenizer, path)
    roles = {tuple(turn.role for turn in one.turns): (one, len(row) > 1) for row in reversed(rows) for one in row}
    for one, last_only in roles.values():
        encode_conversation(one, tokenizer, lambda image: 1, last_only=last_only)


def count_tokens(plan: Plan, report: Callable[[int, int, str], None]) -> dict[str, Any]:
    """What one pass over the data feeds the language model; images are read as far as their headers.

    `tokens` are all of them, `visual_tokens` those of images, `counted_tokens` those that are learned. Raises
    InputError for a file that is no image.
    """
    tokenizer_from, tower_from = plan.init or plan.lm, plan.init or plan.tower
    assert tokenizer_from is not None
    assert tower_from is not None
    tokenizer = load_tokenizer(tokenizer_from)
    if plan.lm is not None:
        add_visual_tokens(tokenizer, plan.lm)
    video = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    encoding = plan.config.encoding(TowerFiles.find(tower_from).config)
    tokens = visual = counted = longest = 0
    for number, row in enumerate(plan.rows):
        sample = encode_sample(number, row, tokenizer, encoding, max_length=plan.config.max_length)
        for sequence in sample.sequences:
            tokens += len(sequence.ids)
            visual += sequence.ids.count(video)
            counted += sum(label != IGNORED for label in sequence.labels)
        longest = max(longest, sample.longest)
        report(number + 1, len(plan.rows), "tokens")
    return {"tokens": tokens, "visual_tokens": visual, "counted_tokens": counted, "longest_sample": longest}
