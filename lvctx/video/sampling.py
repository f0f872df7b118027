"""How a video is sampled and at what resolution: declared once, for every command that reads video.

No heavy module is imported here, since the commands' help is made from this file.
"""

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from lvctx.config import Flag
from lvctx.errors import UsageError
from lvctx.video.frame_list import FrameList
from lvctx.video.hybrid import Hybrid, HybridMode
from lvctx.video.squares import FrameMode

Rate = float | Literal["native"]
"""Frames per second, or every frame."""
Decoder = Literal["auto", "pyav", "decord"]
SeekMode = Literal["exact", "keyframe"]
FrameSelection = Literal["group", "adaptive"]
FrameSeparator = Literal["none", "newline"]


def parse_rate(text: str) -> Rate:
    """`native`, a number such as 0.5, or a fraction such as 30000/1001. Raises ValueError for anything else."""
    if text == "native":
        return "native"
    try:
        rate = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        rate = 0.0
    if not 1e-5 <= rate <= 1e5:
        raise ValueError("not a frame rate; give a number such as 1, or native")
    return rate


@dataclass(frozen=True, kw_only=True)
class VideoSampling:
    """Which frames of a video are used, and at what resolution.

    Times count from the first frame of the video. Raises UsageError for values that contradict each other.
    """

    panel: ClassVar[str] = "Video sampling"

    fps: Annotated[Rate | None, Flag(parse=parse_rate, metavar="RATE|native")] = None
    """Frames per second by timestamp, or `native` for every frame. Default: 2 for Qwen-VL, otherwise 1; niah video 1;
    benchmarks take 128 frames instead."""
    frames: Annotated[int | None, Flag(min=1)] = None
    """Number of frames, evenly spread, instead of a rate."""
    max_frames: Annotated[int | None, Flag(min=1)] = None
    """Where the rate gives more frames than this, take this many, evenly spread. Default: 768 for Qwen-VL, 128
    with --endpoint."""
    frames_from: Annotated[FrameList | None, Flag(parse=FrameList.read, metavar="FILE")] = None
    """Frames of each video that were chosen elsewhere: one JSON object per line, {"video": NAME, "frames": [0, 250]},
    or "times" in seconds."""
    start: Annotated[float | None, Flag(min=0)] = None
    """Begin this many seconds into the video."""
    end: Annotated[float | None, Flag(min=0)] = None
    """Stop this many seconds into the video."""
    frame_mode: FrameMode | None = None
    """How a frame becomes a square for CLIP and SigLIP towers. Default: crop, or squash for a VLM whose own
    processor resizes both sides."""
    hybrid: Annotated[Hybrid | None, Flag(parse=Hybrid.parse, metavar="L,M,S")] = None
    """Hybrid resolution L,M,S: of every L frames one has M tokens, the others M/S. Default: one resolution."""
    hybrid_mode: HybridMode = "pair"
    """Qwen-VL: groups of merged pairs of frames, of frames as images, or of single frames."""
    frame_selection: FrameSelection = "group"
    """Which frames have the higher resolution: the first of each group, or those where the image has changed."""
    change_threshold: Annotated[float, Flag(min=0, max=1, needs=("frame_selection=adaptive",))] = 0.1
    """With adaptive frame selection: smallest mean difference, 0 to 1, that counts as a change."""
    frame_separator: FrameSeparator = "none"
    """LlavaOnevision: newline adds the embedding of "\\n" after every frame, as LLaVA-Video does; none adds it
    after the last frame only, as in training."""
    allow_partial: bool = False
    """Use what can be decoded of truncated or damaged videos; rows then have `partial`."""
    decoder: Decoder = "auto"
    """Video decoder; auto is PyAV. decord refuses videos that it would read incorrectly."""
    seek: SeekMode = "exact"
    """keyframe takes the nearest key frames: fast, but the times are off by up to several seconds."""

    def __post_init__(self) -> None:
        if self.fps is not None and self.frames is not None:
            raise UsageError("give either --fps or --frames, not both")
        excluded = ("fps", "frames", "max_frames", "start", "end")
        if self.frames_from is not None and (given := [name for name in excluded if getattr(self, name) is not None]):
            what = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError("--frames-from states all frames of a video", fix=f"drop {what}, or --frames-from")
        if self.frames_from is not None and self.seek == "keyframe":
            raise UsageError("--seek keyframe takes other frames than --frames-from states", fix="drop one of them")
        if self.max_frames is not None and (self.frames is not None or self.fps == "native"):
            raise UsageError("--max-frames limits a frame rate", fix="give --fps a number, and no --frames")
        if (self.start or 0) < 0 or (self.end is not None and self.end <= (self.start or 0)):
            raise UsageError("--start must be at least 0 and before --end", where=f"{self.start or 0:g} to {self.end}")
        if self.frame_selection == "adaptive" and (self.hybrid is None or self.hybrid.uniform):
            raise UsageError("--frame-selection adaptive needs two resolutions", fix="give --hybrid L,M,S")

    def refuse_separator(self, what: str) -> None:
        """Raise UsageError if a separator of frames is given."""
        if self.frame_separator != "none":
            fix = "drop it, or give it where a model of lvctx align or import-longva runs"
            raise UsageError(what, where="--frame-separator", fix=fix)

    @property
    def has_default_rate(self) -> bool:
        """Whether neither a rate, a number of frames nor a file of them is given."""
        return self.fps is None and self.frames is None and self.frames_from is None

    @property
    def resolution(self) -> Hybrid | None:
        """The hybrid resolution with its mode; None if neither was given. The paper's default is 240 tokens."""
        if self.hybrid is None and self.hybrid_mode == "pair":
            return None
        return replace(self.hybrid or Hybrid(), mode=self.hybrid_mode)

    @property
    def threshold(self) -> float | None:
        """`change_threshold` if frames are selected adaptively, otherwise None."""
        return self.change_threshold if self.frame_selection == "adaptive" else None

    @property
    def facts(self) -> dict[str, Any]:
        """The options that decide a model's input pixels, for rows and provenance; unset options are left out."""
        facts = {key: value for key, value in asdict(self).items() if value is not None and value is not False}
        if self.frames_from is not None:
            facts["frames_from"] = self.frames_from.digest
        del facts["frame_selection"], facts["change_threshold"]
        if self.frame_separator == "none":
            del facts["frame_separator"]
        if self.hybrid is not None:
            facts["hybrid"] = [self.hybrid.group, self.hybrid.tokens, self.hybrid.ratio]
        if self.threshold is not None:
            facts["change_threshold"] = self.threshold
        return facts
