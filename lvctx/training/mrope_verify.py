"""Compare a Qwen-VL checkpoint's positions, as stock transformers computes them, with their formula, by channel."""

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from lvctx.artifacts.store import atomic_file
from lvctx.errors import library_errors
from lvctx.models.loading import load_config, resolve_model
from lvctx.rope.mrope import METHODS, Mrope, RopeScaling, inv_freq, mrope_attention_factor
from lvctx.rope.mrope_pp import Ramp
from lvctx.training.mrope_checkpoint import Checkpoint, read_checkpoint

ROTARY_CLASSES = {
    "qwen2_vl": "Qwen2VLRotaryEmbedding",
    "qwen2_5_vl": "Qwen2_5_VLRotaryEmbedding",
    "qwen3_vl": "Qwen3VLTextRotaryEmbedding",
}
"""Model type -> the class of transformers' `modeling_TYPE` that computes angles from positions."""

FREQUENCY_TOLERANCE = 1e-6
"""Relative tolerance for float32 arithmetic."""


class Channel(NamedTuple):
    """One frequency of a head."""

    axis: str
    """t, h or w: the axis whose position it rotates by."""
    plain: float
    """Wavelength in positions before scaling."""
    wavelength: float
    """Wavelength in positions as computed by transformers."""
    formula: float | None
    """Wavelength by the formula in float64; None if the formula is not known."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The positions that transformers computes for a checkpoint."""

    checkpoint: Checkpoint
    """The verified checkpoint."""
    channels: tuple[Channel, ...]
    """Fastest first."""
    attention: float
    """The factor by which transformers multiplies cos and sin."""
    error: float | None
    """Largest relative error of a frequency or of the attention factor; None if the formula is not known."""

    @property
    def holds(self) -> bool:
        """Whether formula and transformers agree, if the formula is known."""
        return self.error is None or self.error <= FREQUENCY_TOLERANCE

    def summary(self) -> dict[str, Any]:
        """Facts for a row: its RoPE scaling, the channels of each axis, largest relative error."""
        axes = "".join(channel.axis for channel in self.channels)
        return {
            "stretched": self.checkpoint.scaling_text or "no",
            "pretrained_length": self.checkpoint.length,
            "channels": {name: axes.count(name[0]) for name in ("time", "height", "width")},
            "interleaved": self.checkpoint.mrope.interleaved,
            "attention_factor": self.attention,
            "largest_relative_error": self.error,
        }


def verify(model: str | Path) -> Verified:
    """Compare a checkpoint's frequencies; reads config.json (and the manifest, for the formula), no weights."""
    checkpoint = read_checkpoint(resolve_model(model))
    kind = checkpoint.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = load_config(checkpoint.path).get_text_config()
    with library_errors("transformers cannot compute its positions", where=checkpoint.path):
        rotary = getattr(module, ROTARY_CLASSES[kind])(config)
    stock = rotary.inv_freq.double()
    plain = RopeScaling(method="none", ramp="index", factor=1.0, original=checkpoint.length or checkpoint.context)
    scaling = checkpoint.scaling or (None if checkpoint.scaling_text else plain)
    formula = inv_freq(checkpoint.mrope, scaling) if scaling else None
    error = None
    if scaling is not None and formula is not None:
        expected = mrope_attention_factor(checkpoint.mrope, scaling)
        frequencies = float(((stock - formula) / formula).abs().max())
        error = max(frequencies, abs(rotary.attention_scaling - expected) / expected)
    pretrained = inv_freq(checkpoint.mrope, plain)
    channels = tuple(
        Channel(
            axis=checkpoint.mrope.axes[j],
            plain=_wavelength(pretrained[j]),
            wavelength=_wavelength(stock[j]),
            formula=None if formula is None else _wavelength(formula[j]),
        )
        for j in range(len(stock))
    )
    return Verified(checkpoint=checkpoint, channels=channels, attention=float(rotary.attention_scaling), error=error)


def _wavelength(frequency: torch.Tensor) -> float:
    return 2 * math.pi / float(frequency)


def draw_curves(mrope: Mrope, scaling: RopeScaling, target: Path) -> None:
    """Plot the ratio of scaled to pretrained frequency per channel and method (.png or .svg); sections are shaded."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plain = inv_freq(mrope, RopeScaling(method="none", ramp="index", factor=1.0, original=scaling.original))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    ax: Any = figure.subplots()
    for method in METHODS:
        if method == "mrope++" and mrope.interleaved:
            continue
        ours = method == "mrope++"
        for ramp in get_args(Ramp) if ours else ("index",):
            variant = RopeScaling(method=method, ramp=ramp, factor=scaling.factor, original=scaling.original)
            label, style = (f"{method} {ramp}", "-") if ours else (method, "--")
            ax.plot((inv_freq(mrope, variant) / plain).tolist(), style, label=label, lw=1.8 if ours else 1.1)
    if not mrope.interleaved:
        time, height, width = mrope.sections
        for name, start, size in (("time", 0, time), ("height", time, height), ("width", time + height, width)):
            if name == "height":
                ax.axvspan(start - 0.5, start + size - 0.5, color="#f0f0f0", lw=0)
            ax.text(start + size / 2 - 0.5, 1.02, name, ha="center", fontsize=8, transform=ax.get_xaxis_transform())
    ax.set_xlabel("channel, fastest first", fontsize=8)
    ax.set_ylabel("frequency relative to pretrained", fontsize=8)
    ax.set_title(f"{scaling.factor:g} x {scaling.original:,} positions", fontsize=9, loc="left", pad=14)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=7, frameon=False)
    with atomic_file(target) as partial, rc_context({"svg.hashsalt": "lvctx"}):
        # No date or version in the file, so that the same numbers give the same bytes.
        metadata = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(partial, format=target.suffix[1:], metadata=metadata)
