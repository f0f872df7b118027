"""Ask Qwen2-VL or Qwen2.5-VL about a video file: sampled, resized, counted, then read in one forward."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lvctx.dist.ring import ALONE, Ring
from lvctx.errors import InputError, UsageError
from lvctx.model.load import context_length, load_config, load_model, load_tokenizer, resolve_model
from lvctx.model.qwen_vl import TYPES, Prompt, greedy
from lvctx.positions.mrope_ids import Rules, Text, positions
from lvctx.stages.vqa import Answer, Watcher
from lvctx.vision.decode import Frame, read_frames
from lvctx.vision.film import Count, Film, check_reachable, count, pixels, shoot
from lvctx.vision.hybrid import Hybrid, Mode
from lvctx.vision.rules import find_rule

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """How a video is sampled and sized."""

    fps: float = 2.0
    """Frames a second; the paper's."""
    max_frames: int = 768
    """Where the rate gives more, this many evenly spread; the processor's own default."""
    hybrid: Hybrid = field(default_factory=Hybrid)
    """Resolution; uniform at 240 tokens a grid by default."""
    threshold: float | None = None
    """Adaptive selection of high resolution: least difference from the last high frame, 0 to 1. None: by group."""


def viewing(*, hybrid: str, mode: Mode, **options: Any) -> Viewing:
    """A `Viewing` with its resolution as L,M,S. Raises UsageError for other text, or a size that cannot be had."""
    try:
        group, tokens, ratio = map(int, hybrid.split(","))
    except ValueError:
        raise UsageError(f"--hybrid {hybrid!r} is not L,M,S", fix="write 4,240,3") from None
    resolution = Hybrid(group=group, tokens=tokens, ratio=ratio, mode=mode)
    check_reachable(resolution)
    return Viewing(hybrid=resolution, **options)


def cost(model: str, *, frames: int, size: str, viewing: Viewing) -> Count:
    """Tokens and positions of a video of `size` WxH pixels, from the model's configuration alone.

    Raises UsageError for text that is no size, InputError for a model that is neither Qwen2-VL nor Qwen2.5-VL.
    """
    try:
        width, height = map(int, size.lower().split("x"))
    except ValueError:
        raise UsageError(f"--size {size!r} is not WxH", fix="write 1280x720") from None
    path = resolve_model(model)
    if load_config(path).model_type not in TYPES:
        raise InputError("only videos of Qwen2-VL and Qwen2.5-VL are counted", where=path, fix="drop --frames")
    rule: Any = find_rule(path, load_tokenizer(path), hybrid=vars(viewing.hybrid), grid_rule="code")
    seconds = Rules.of(load_config(path)).tokens_per_second
    return count(frames, width, height, rule, fps=viewing.fps, tokens_per_second=seconds)


def open_watcher(
    model: str, *, viewing: Viewing, device: str, tell: Callable[[str], None], ring: Ring = ALONE
) -> "Watcher | QwenWatcher":
    """Load a model that watches: Qwen-VL for video files, any other for frames artifacts.

    `tell` takes lines for people: what a video costs, before the model reads it. The ranks of a
    `ring` watch together. Raises InputError and UsageError.
    """
    if load_config(resolve_model(model)).model_type in TYPES:
        if ring.world > 1:
            raise UsageError("--cp is for encoded frames", fix="let a Qwen-VL model watch in one process")
        return QwenWatcher(model, viewing=viewing, device=device, tell=tell)
    if viewing != Viewing():
        raise UsageError(f"{model} is no Qwen-VL model and reads encoded frames as they are", fix="drop its flags")
    return Watcher(model, device=device, ring=ring)


class QwenWatcher:
    """A loaded Qwen-VL model that answers questions about video files."""

    def __init__(self, model: str, *, viewing: Viewing, device: str, tell: Callable[[str], None]) -> None:
        """Load the model. Raises InputError if it cannot be loaded, UsageError for a resolution it cannot have."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        path = resolve_model(model)
        self.viewing, self.tell = viewing, tell
        self.tokenizer = load_tokenizer(path)
        hybrid = vars(viewing.hybrid)
        self.rule: Any = find_rule(path, self.tokenizer, hybrid=hybrid, grid_rule="code")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.rules = Rules.of(load_config(path))
        self.vlm = load_model(path, device=device)

    def ask(self, path: Path, questions: Sequence[str], *, max_new_tokens: int) -> Iterator[Answer]:
        """Greedy answers to each question about one video.

        Raises InputError for a video that cannot be read, or one with positions beyond what the model promises.
        """
        film = self.film(path)
        seen = pixels(film, self.processor)
        for question in questions:
            prompt = self.prompt(film, seen, question)
            self._check(prompt, path, max_new_tokens)
            stop = self._stop()
            text = self.tokenizer.decode(
                greedy(self.vlm, prompt, max_new_tokens=max_new_tokens, stop=stop), skip_special_tokens=True
            )
            shown = (film.pts[0], film.pts[-1])
            yield Answer(
                question=question, text=text.strip(), frames=len(film.frames), seconds=shown, tokens=len(prompt.ids)
            )

    def film(self, path: Path) -> Film:
        """Read and resize a video's frames, and say what they cost."""
        viewing = self.viewing
        film = self._shoot(islice(read_frames(path, fps=viewing.fps), viewing.max_frames + 1))
        if len(film.frames) > viewing.max_frames:
            film = self._shoot(read_frames(path, frames=viewing.max_frames))
        tokens = sum(block.tokens for block in film.blocks)
        self.tell(
            f"{path}: {len(film.frames)} frames in {len(film.runs)} runs, {tokens} visual tokens "
            f"(nominal {film.nominal}) and {2 * len(film.blocks)} delimiters"
        )
        return film

    def _shoot(self, frames: Iterable[Frame]) -> Film:
        shots = ((frame.pts, frame.image) for frame in frames)
        return shoot(shots, self.rule, threshold=self.viewing.threshold, resample=self.processor.resample)

    def prompt(self, film: Film, seen: dict[str, Any], question: str) -> Prompt:
        """A one-turn chat about the film that ends where the answer begins."""
        mark = self.rule.mark("video")
        messages = [{"role": "user", "content": mark + question.replace(mark, "")}]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer.encode(chat, add_special_tokens=False)
        at = ids.index(self.rule.pads["video"])
        visual = self.rule.layout(film.blocks).ids
        before, after = len(ids[:at]) + 1, len(ids[at + 1 :]) + 1
        ids[at : at + 1] = visual
        found, free = positions([Text(before), film.part(self.rules.tokens_per_second), Text(after)])
        assert found.shape[1] == len(ids)
        return Prompt(ids=ids, positions=found, after=free, pixels=seen)

    def _check(self, prompt: Prompt, path: Path, max_new_tokens: int) -> None:
        longest = context_length(self.vlm.config)
        if prompt.after + max_new_tokens > longest:
            raise InputError(
                f"positions up to {prompt.after + max_new_tokens} exceed the model's {longest}",
                where=path,
                fix="fewer frames, or lvctx mrope-extend",
            )
        if len(prompt.ids) > longest:
            log.warning("%s: %d tokens, though positions end at %d", path, len(prompt.ids), prompt.after - 1)

    def _stop(self) -> set[int]:
        ends = self.vlm.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}
