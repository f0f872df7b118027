"""Our models in lmms-eval: `lmms-eval --model lvctx --model_args pretrained=DIR,frames=32 --tasks ...`.

Found through the entry-point group `lmms_eval.models`; nothing of lmms-eval is needed to use this project without it.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from lvctx.errors import LvctxError, UsageError
from lvctx.model.load import resolve_model
from lvctx.stages.asker import Asker
from lvctx.vision.decode import read_frames
from lvctx.vision.images import FrameMode
from lvctx.vision.tower import Tower, load_tower

log = logging.getLogger(__name__)


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(model_id="lvctx", simple_class_path=f"{__name__}.Lvctx")


class Lvctx(lmms):
    """A VLM directory or hub id. A video is `frames` frames evenly spread, a picture what `align` made of them.

    With `allow_partial` cut or damaged videos are taken for what can be decoded of them.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        frames: int = 32,
        frame_mode: FrameMode = "crop",
        allow_partial: bool = False,
        chunk: int = 2048,
        device: str | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        """Load the model. Raises InputError where it cannot be loaded, ValueError for arguments it does not know."""
        super().__init__()
        if unknown:
            raise ValueError(f"unknown model arguments: {', '.join(unknown)}")
        path = resolve_model(pretrained)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if place.startswith("cuda") and not torch.cuda.is_available():
            place = "cpu"  # lmms-eval says cuda:0 unless it is told otherwise
        self.asker = Asker(path, device=place, chunk=int(chunk))
        self.tower: Tower = load_tower(path, dtype=self.asker.vlm.dtype, device=place)
        self.frames, self.frame_mode, self.device = int(frames), frame_mode, torch.device(place)
        self.allow_partial = str(allow_partial).lower() in ("true", "1")
        self._shown: Any = None

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Greedy replies, cut before the first of the request's `until`; an empty one where a visual cannot be read."""
        replies = []
        for request in requests:
            context, options, visuals = request.args[0], request.args[1], self._visuals(request)
            try:
                self._show(visuals)
                said = self.asker.reply(self.asker.ids(context), int(options.get("max_new_tokens", 1024)))
                reply = self.asker.text(said)
            except LvctxError as e:
                log.warning("no reply to %s: %s", request.args[3], e)
                reply = ""
            until = options.get("until") or []
            for end in [until] if isinstance(until, str) else until:
                reply = reply.split(end)[0] if end else reply
            replies.append(reply)
        return replies

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, in nats, and whether greedy decoding would write it."""
        found = []
        for request in requests:
            context, target = request.args[:2]
            _, _, visuals, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            self._show(visuals(doc))
            text = target if isinstance(target, str) else target(doc)
            answer = np.array(self.asker.tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
            score = self.asker.reader.score(np.concatenate([self.asker.ids(context), answer]), len(answer))
            found.append((score.log_prob, score.forced))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raises UsageError: nothing here goes on from an answer."""
        raise UsageError("lmms-eval's tasks of several rounds are not answered", fix="leave them out of --tasks")

    def _visuals(self, request: Any) -> list[Any]:
        _, _, visuals, doc_id, task, split = request.args
        found: list[Any] = visuals(self.task_dict[task][split][doc_id]) or []
        return found

    def _show(self, visuals: list[Any]) -> None:
        """Show videos and pictures, unless they were shown last: then their keys and values still stand."""
        if self._shown is not None and self._shown == visuals:
            return
        self._shown = None
        if not visuals:
            raise LvctxError("a question without anything to see")
        pictures = sum(not isinstance(visual, str | Path) for visual in visuals)
        self.asker.show_blocks(
            [
                self._video(Path(visual))
                if isinstance(visual, str | Path)
                else self.asker.image_block(visual.convert("RGB"), alone=pictures == 1)
                for visual in visuals
            ]
        )
        self._shown = visuals

    def _video(self, path: Path) -> torch.Tensor:
        read = read_frames(path, frames=self.frames, allow_partial=self.allow_partial)
        shots = (Image.fromarray(frame.image) for frame in read)
        return self.asker.video_block(
            self.tower.see([self.tower.preprocess.square(shot, self.frame_mode) for shot in shots])
        )
