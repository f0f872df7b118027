"""Images, videos and prompts as stock code of transformers takes them.

Shapes: N tokens, up to and with the last placeholder of a prompt; L tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Sampled frames of a video."""

    frames: Sequence[Image.Image | np.ndarray]
    """RGB, of one size."""
    times: Sequence[float]
    """When each is shown, in seconds."""


VisualItem = Image.Image | Clip
"""An image, or a video."""


@dataclass(frozen=True, kw_only=True)
class ChatText:
    """A conversation about images and videos as the chat template writes it."""

    head: str
    """Up to the first placeholder."""
    separators: list[str]
    """Between two placeholders after each other."""
    tail: str
    """After the last; control tokens that a user typed are marked as text."""


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What the processor makes of some images and videos."""

    texts: list[str]
    """The placeholder of each of them in the text."""
    inputs: Any
    """What the model's forward takes: ids of the texts one after the other, pixels, sizes."""


@dataclass(frozen=True, kw_only=True)
class StockPrompt:
    """What stock code feeds a model for a prompt, without what follows the last placeholder."""

    inputs: Any
    """Of the processor: ids (1, L), masks, pixels."""
    length: int
    """Tokens up to and with the last placeholder."""
    chat: ChatText
    """Of an empty question."""
    last_text: str
    """What the media became."""

    @property
    def ids(self) -> np.ndarray:
        """Ids (N,), placeholders included."""
        ids: np.ndarray = self.inputs["input_ids"][0, : self.length].numpy()
        return ids

    def continued(self, tail: Sequence[int]) -> dict[str, Any]:
        """The inputs with these ids at the end, all of them text."""
        import torch

        ids, result = self.inputs["input_ids"], dict(self.inputs)
        for name, value in self.inputs.items():
            if getattr(value, "shape", None) == ids.shape:
                more = torch.full((1, len(tail)), int(name == "attention_mask"), dtype=value.dtype)
                if name == "input_ids":
                    more = torch.tensor([list(tail)], dtype=value.dtype)
                result[name] = torch.cat([value[:, : self.length], more], dim=1)
        return result


def video_metadata(clip: Clip) -> dict[str, Any]:
    """What processors that write times into the text need: frame numbers over a rate are the times."""
    frames = len(clip.frames)
    height, width = np.asarray(clip.frames[0]).shape[:2]
    step = (clip.times[-1] - clip.times[0]) / (frames - 1) if frames > 1 else 1.0
    fps = 1 / step if step > 0 else 1.0
    return {
        "total_num_frames": frames,
        "fps": fps,
        "width": width,
        "height": height,
        "duration": frames / fps,
        "video_backend": "pyav",
        "frames_indices": [time * fps for time in clip.times],
    }
