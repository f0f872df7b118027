"""Ask Qwen-VL models about video files, and say what a video will cost."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lvctx.dist.ring import ALONE, Ring
from lvctx.errors import InputError, UsageError
from lvctx.model.load import DeviceMap, load_config, load_tokenizer, resolve_model
from lvctx.model.qwen_vl import TIMED, TYPES
from lvctx.positions.mrope_ids import Rules
from lvctx.stages.qwen_asker import QwenAsker, Viewing, viewing
from lvctx.stages.vqa import CHUNK, Watcher
from lvctx.vision.film import Count, count
from lvctx.vision.rules import find_rule

__all__ = ["QwenWatcher", "Viewing", "cost", "open_watcher", "viewing"]
log = logging.getLogger(__name__)


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
    rule: Any = find_rule(path, load_tokenizer(path), hybrid=vars(viewing.hybrid))
    seconds = Rules.of(load_config(path)).tokens_per_second
    return count(frames, width, height, rule, fps=viewing.fps, tokens_per_second=seconds)


def open_watcher(
    model: str,
    *,
    viewing: Viewing,
    device: str,
    tell: Callable[[str], None],
    ring: Ring = ALONE,
    device_map: DeviceMap | None = None,
) -> Watcher:
    """Load a model that watches: Qwen-VL for video files, any other for frames artifacts.

    `tell` takes lines for people: what a video costs, before the model reads it. The ranks of a
    `ring` watch together, or a `device_map` says where the model's modules are. Raises InputError, UsageError, and
    MissingError without accelerate.
    """
    if load_config(resolve_model(model)).model_type in TYPES + TIMED:
        if ring.world > 1:
            raise UsageError("--cp is for encoded frames", fix="let a Qwen-VL model watch in one process")
        return QwenWatcher(model, viewing=viewing, device=device, tell=tell, device_map=device_map)
    if viewing != Viewing():
        raise UsageError(f"{model} is no Qwen-VL model and reads encoded frames as they are", fix="drop its flags")
    return Watcher(model, device=device, ring=ring, device_map=device_map)


class QwenWatcher(Watcher):
    """A loaded Qwen-VL model that answers questions about video files; each is read once."""

    def __init__(
        self,
        model: str,
        *,
        viewing: Viewing,
        device: str,
        tell: Callable[[str], None],
        device_map: DeviceMap | None = None,
    ) -> None:
        """Load the model. Raises InputError if it cannot be loaded, UsageError for a resolution it cannot have."""
        self.tell = tell
        self.asker: QwenAsker = QwenAsker(
            resolve_model(model), viewing=viewing, device=device, chunk=CHUNK, device_map=device_map
        )

    def _show(self, path: Path) -> tuple[float, ...]:
        film, facts = self.asker.watch(path)
        self.partial = bool(facts.get("partial"))
        tokens = sum(block.tokens for block in film.blocks)
        self.tell(
            f"{path}: {len(film.frames)} frames in {len(film.runs)} runs, {tokens} visual tokens "
            f"(nominal {film.nominal}) and {len(self.asker.block) - tokens} delimiters"
        )
        last = self.asker.last_position(self.asker.ids(""))
        if tokens > self.asker.context:
            log.warning("%s: %d tokens, though positions end at %d", path, tokens, last)
        return tuple(film.pts)
