"""The needles and distractors of a video test, from its configuration: drawn, or read from a list."""

from dataclasses import replace
from pathlib import Path

from lvctx.errors import UsageError
from lvctx.eval.niah.image_needles import NeedleSet, drawn_groups, drawn_needles
from lvctx.eval.niah.needle_folder import read_needles
from lvctx.eval.niah.niah_config import DEFAULT_DEPTHS, VideoNiahConfig


def find_needles(config: VideoNiahConfig, size: int) -> NeedleSet:
    """The needles and distractors of a test, drawn with `size` pixels a side or read. Raises UsageError, InputError."""
    grouped = config.count > 1 or config.needle_frames > 1 or config.question == "code"
    if config.needles == "drawn" and grouped:
        return drawn_groups(
            config.trials,
            per_trial=config.count,
            frames=config.needle_frames,
            question=config.question,
            size=size,
            seed=config.seed,
            distractors=config.distractors,
        )
    if config.needles == "drawn":
        drawn = drawn_needles(config.trials, size=size, seed=config.seed, distractors=config.distractors)
        return drawn if config.question == "what" else replace(drawn, chance=None)
    needles = read_needles(Path(config.needles))
    if needles.spread and config.question != "what":
        raise UsageError("these needles have questions of their own", where="--question", fix="drop it")
    if not needles.has_depths and config.depths != DEFAULT_DEPTHS:
        raise UsageError("these needles are spread over the whole video", where="--depths", fix="drop it")
    if needles.paired and config.distractors > 1:
        raise UsageError("every needle of this folder has one distractor", where="--distractors", fix="give 0 or 1")
    if config.distractors > len(needles.distractors):
        raise UsageError(
            f"--distractors {config.distractors} with {len(needles.distractors)} distractors in {config.needles}",
            fix='give them lines with "distractor": true',
        )
    repeated = [needle for needle in needles.needles for _ in range(config.needle_frames)]
    distractors = needles.distractors[: len(needles.needles) if needles.paired else config.distractors]
    distractors = distractors if config.distractors else []
    chance = needles.chance if config.question == "what" else None
    return replace(needles, needles=repeated, frames=config.needle_frames, distractors=distractors, chance=chance)
