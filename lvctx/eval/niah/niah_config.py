"""Configuration of needle tests. No heavy module is imported here, since the commands' help is made from this file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from lvctx.config import Flag, parse_integers, parse_numbers
from lvctx.errors import UsageError

Scoring = Literal["forced", "generate", "both", "longvila", "videochat-flash"]
NeedleQuestion = Literal["what", "when", "count", "order", "values", "hops", "code"]
TextTask = Literal[
    "single",
    "multi-key",
    "multi-value",
    "multi-query",
    "variable-tracking",
    "common-words",
    "frequent-words",
    "qa",
]
WHOLE_TEXT: tuple[TextTask, ...] = ("common-words", "frequent-words", "qa")
"""Tasks over the whole text, without a needle."""
OF_NEEDLES = ("depths", "distractors", "loop", "city", "length_of")
"""Options that have no meaning for them."""
RopeScheme = Literal["theta", "pi", "ntk", "yarn"]
SEVERAL = ("task=multi-key", "task=multi-value", "task=multi-query", "task=variable-tracking")
DEPTHS = "0,0.2,0.4,0.6,0.8,1"
"""LongVA's."""


@dataclass(frozen=True, kw_only=True)
class Depths:
    """Where needles are inserted, as shares of the haystack."""

    values: tuple[float, ...]
    """0 to 1, ascending."""
    nested: bool = False
    """Whether they are positions of the longest haystack, shared by all lengths (see `needle_task.py`)."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`0,0.5,1`, `nested` or `nested:0,0.5,1`. Raises ValueError."""
        nested = text == "nested" or text.startswith("nested:")
        values_text = (text.partition(":")[2] or DEPTHS) if nested else text
        values = parse_numbers(values_text)
        if any(not 0 <= depth <= 1 for depth in values):
            raise ValueError("depths have to be between 0 and 1")
        return cls(values=values, nested=nested)

    def __str__(self) -> str:
        return ("nested:" if self.nested else "") + ",".join(f"{depth:g}" for depth in self.values)


DEFAULT_DEPTHS = Depths.parse(DEPTHS)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers of at least 1, each kept once, ascending. Raises ValueError."""
    lengths = parse_integers(text)
    if min(lengths) < 1:
        raise ValueError("lengths have to be at least 1")
    return lengths


def parse_ropes(text: str) -> tuple[tuple[RopeScheme, float], ...]:
    """`yarn:2,yarn:4,theta:1e6`. Raises UsageError for an unknown scheme or a number below 1."""
    ropes: list[tuple[RopeScheme, float]] = []
    for part in text.split(",") if text else ():
        name, _, number = part.strip().partition(":")
        scheme = next((candidate for candidate in get_args(RopeScheme) if candidate == name), None)
        if scheme is None:
            raise UsageError(f"--rope {name} is unknown", fix="write one of theta, pi, ntk, yarn, then : and a number")
        (value,) = parse_numbers(number)
        if value < 1:
            raise UsageError(f"--rope {name}:{value:g} is less than 1")
        ropes.append((scheme, value))
    return tuple(ropes)


@dataclass(frozen=True, kw_only=True)
class NiahConfig:
    """Options common to text and video needles."""

    model: str
    """Model: directory or hub id; with --endpoint its name on the server."""
    haystack: tuple[Path, ...]
    """Videos, features of encode-video or niah haystack, or folders of images, one after another."""
    lengths: Annotated[tuple[int, ...], Flag(parse=parse_lengths)]
    """Haystack lengths, comma-separated: tokens of the whole sequence for text, frames for video."""
    depths: Annotated[Depths, Flag(parse=Depths.parse)] = DEFAULT_DEPTHS
    """Needle depths, 0 to 1, comma-separated. `nested[:...]` uses insertion points that all lengths share."""
    trials: Annotated[int, Flag(min=1, max=10_000)] = 5
    """Trials per cell, each with a different needle."""
    distractors: Annotated[int, Flag(min=0, max=20)] = 0
    """Distractors in the haystack: needles of the same kind with other answers."""
    loop: bool = False
    """Repeat a haystack that is shorter than the longest length."""
    scoring: Scoring | None = None
    """Teacher forcing, greedy generation, or both; longvila and videochat-flash compare the text of the most likely
    tokens, as those scripts do. Default: forced, or generate if answers have several forms."""
    training_length: Annotated[int | None, Flag(min=1)] = None
    """Tokens that the language model was trained on, drawn as a line. Default: from its directory."""
    rope: Annotated[tuple[tuple[RopeScheme, float], ...], Flag(parse=parse_ropes, metavar="SCHEME:NUMBER,...")] = ()
    """Evaluate with these positions instead of the model's own, without training: theta:1e6,yarn:2,yarn:4."""
    seed: int = 0
    """Seed of needles and of distractor positions."""


@dataclass(frozen=True, kw_only=True)
class TextNiahConfig(NiahConfig):
    """Needles in text."""

    haystack: tuple[Path, ...] = ()
    """Text: files or folders. For --task common-words the words are taken from it; for qa it is SQuAD's or HotpotQA's
    JSON file; frequent-words has none.
    """
    task: TextTask = "single"
    """Task, as in RULER: kinds of needles, or one over the whole text (common-words, frequent-words, qa)."""
    count: Annotated[int, Flag(min=2, max=10, needs=SEVERAL)] = 4
    """Keys, values, queries or hops of the task."""
    city: str | None = None
    """The city that is asked about in every trial: Singapore is LongVA's. Default: another one in each trial."""
    length_of: Literal["sequence", "haystack"] = "sequence"
    """What --lengths counts: all tokens of a sequence, or the haystack without needle and prompt (LongVA's script)."""

    def __post_init__(self) -> None:
        if self.task == "frequent-words" and self.haystack:
            raise UsageError("--task frequent-words draws its text", fix="drop --haystack")
        if self.task != "frequent-words" and not self.haystack:
            raise UsageError(f"--task {self.task} needs a haystack", fix="give --haystack")


@dataclass(frozen=True, kw_only=True)
class VideoNiahConfig(NiahConfig):
    """Needles in a video: V-NIAH."""

    needles: str = "drawn"
    """Needle images: drawn, a folder with images and one .jsonl, LongVA's dataset.json, or a dataset such as
    lmms-lab/v_niah_needles."""
    question: NeedleQuestion = "what"
    """Question: what the needle shows, when it is shown, how many needles there are, in which order, what all needles
    of one key show (values), what a needle shows that other needles lead to (hops), or which code it shows (code).
    """
    count: Annotated[int, Flag(min=1, max=6)] = 1
    """Drawn needles of a trial. what and code ask about one of them, order and values about all, count how many there
    are (from 1 to this number), and hops about one that half of the others lead to.
    """
    needle_frames: Annotated[int, Flag(min=1, max=64)] = 1
    """Frames of a needle: a short clip of a drawn shape that moves; an image of a folder is repeated."""
    tolerance: Annotated[float, Flag(min=0, needs=("question=when",))] = 2.0
    """Tolerance in seconds for the answer to when."""
    as_images: bool = False
    """Encode every frame as a separate image, as in Visual Haystacks, instead of one video (Qwen-VL)."""

    def __post_init__(self) -> None:
        if self.question in ("count", "order", "values", "hops") and self.count == 1:
            raise UsageError(f"--question {self.question} is about several needles", fix="give --count, such as 4")
        if self.question == "when" and self.count > 1:
            raise UsageError("--question when is about one needle", fix="drop --count")
        if self.question == "code" and self.needles != "drawn":
            raise UsageError("--question code is about drawn needles", fix="drop --needles")
        if self.needles != "drawn" and self.count > 1:
            raise UsageError("--count with needles of a folder", fix="drop --count, or --needles for drawn ones")
