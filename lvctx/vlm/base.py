"""The interface of a family of vision-language models, for one checkpoint and without its weights.

A family turns images and videos into ids of an extended vocabulary: ids below V are text tokens, ids from V on are rows
of a table of visual embeddings. Together with position ids, this is all that the language model needs, and so all that
scoring and generation depend on. A new family is one file with a class like `VLM`, and one line in `registry.py`.

Shapes: F frames, N visual tokens, L tokens of a sequence, R rows of the table, E width of the language model; the table
is wider than E if deeper layers get visual inputs too (Qwen3-VL).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lvctx.cost import CostMeter
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.token_count import VisualRule

Positions = Callable[[np.ndarray, int], Tensor]
"""Position ids of a sequence's tokens from the given one on, as the language model takes them: (1, L), or (3, 1, L) for
M-RoPE. They may depend on earlier tokens but not on later ones: otherwise prefixes could not be shared. A text token
follows the largest position before it, by which replies are placed."""


def sequential_positions(ids_L: np.ndarray, first: int) -> Tensor:
    """Positions that count the tokens."""
    return torch.arange(first, len(ids_L))[None]


class PromptTail(Protocol):
    """What follows the visual ids of a prompt, where these begin with the prompt itself."""

    def __call__(self, turns: Sequence[str], answer: str = "") -> tuple[list[int], list[int]]:
        """Ids up to where the reply to these turns begins, and ids of an answer that follows. Raises InputError."""


def prompt_tail(visual: "VisualInput | VisualTokens") -> PromptTail | None:
    """The `tail` of families that write prompts with the model's own processor; None: `chat_ids` makes a prompt."""
    tail: PromptTail | None = getattr(visual, "tail", None)
    return tail


@dataclass(frozen=True, kw_only=True)
class VisualInput:
    """Images and videos of a prompt, in order."""

    ids_N: np.ndarray
    """Ids of the extended vocabulary, delimiters included."""
    table: Callable[[Any], Tensor]
    """Computes the embeddings (R, E) of the ids from V on, given the loaded model."""
    placeholder: str
    """The placeholder token of the whole block in a chat's text."""
    positions: Positions = sequential_positions
    """Position ids of sequences with these ids."""
    tokens: int
    """Number of visual tokens, without delimiters."""
    pts: tuple[float, ...] = ()
    """Timestamp of each video frame, in seconds."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Its fields in result rows: frames, `visual_tokens`, the hash of the video, damage."""
    tail: PromptTail | None = None
    """Given where the ids begin with the prompt itself; otherwise they take the place of `placeholder` in a chat."""


class VisualTokens(Protocol):
    """Frames of a haystack and images inserted among them, for sequences in any order; equal frames have equal ids.

    Where `ids` begin with the prompt itself, it has a `tail` as `VisualInput` has.
    """

    placeholder: str
    """The placeholder token of the block in a chat's text."""
    frames_per_grid: int
    """Number of frames that the model merges: an inserted image is repeated that often, between whole grids."""
    facts: dict[str, Any]
    """The facts that decide a result, for the keys of rows."""

    def ids(self, order_F: np.ndarray) -> np.ndarray:
        """Ids of these frames in this order: haystack frames by number, then the inserted images."""

    def table(self, model: Any) -> Tensor:
        """Embeddings (R, E), given the loaded model; for all sequences that `ids` was called with."""

    def positions(self, ids_L: np.ndarray, first: int) -> Tensor:
        """See `Positions`."""


class Haystack(Protocol):
    """One long video, of one or more consecutive files, in which needles are inserted."""

    seconds: np.ndarray
    """Timestamp of each frame; only complete grids of frames are included."""
    image_size: int
    """Side in pixels of an image drawn for it."""

    def tokens(self, frames: int, images: Sequence[Image.Image]) -> VisualTokens:
        """The first `frames` frames with these images for insertion."""


class VLM(Protocol):
    """A checkpoint of a model family."""

    path: Path
    """Its directory."""
    vocabulary: int
    """V: the first id that is a row of the visual table."""
    has_feature_cache: bool
    """Whether it keeps the vision features of video files in a folder; see `open_vlm`."""
    meter: CostMeter
    """Of what its conversation costs: reading and encoding here, the rest by its engine."""

    def resolve(self, sampling: VideoSampling) -> VideoSampling:
        """Apply the family's defaults. Raises UsageError for unsupported options, before anything is loaded."""

    def load(self, items: Sequence[Path | Image.Image], sampling: VideoSampling) -> VisualInput:
        """Read videos (files, or feature caches if the family has them) and RGB images, in order.

        Raises InputError for files that cannot be read or were encoded by another model, UsageError as `resolve` does.
        """

    def image_facts(self) -> dict[str, Any]:
        """The settings that decide an image's input pixels, for rows."""

    def haystack(self, files: Sequence[Path], sampling: VideoSampling, *, as_images: bool) -> Haystack:
        """The files as one video, sampled at one frame per second (V-NIAH's) unless `sampling` has another rate.

        `as_images` makes every frame a separate image. Raises as `load`.
        """

    def count(self, frames: int, width: int, height: int, sampling: VideoSampling) -> dict[str, int]:
        """Tokens and last position of a video with this number of frames and size in pixels, without reading one."""

    def token_rule(self, sampling: VideoSampling) -> VisualRule:
        """The token count of images and videos in training samples. Raises InputError for unsupported checkpoints."""
