"""The benchmarks that lvctx runs: an entry here and a module of this package each. No torch.

A module has NAME, STYLES (prompt templates), GROUPS (fields that the `groups` of every row have), FREE_ANSWERS (whether
a question may have no options), COLUMNS (alternatives of columns by which its question files are recognized),
samples(), prompt() and score(). Some have HUB, SUBTITLES, SEEDED or export().
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True, kw_only=True)
class BenchmarkInfo:
    """What `lvctx bench list` shows of a benchmark."""

    title: str
    """Its published name."""
    what: str
    """One line for the help."""
    dataset: str
    """Dataset on the Hugging Face hub."""
    questions: int
    """Number of questions of the split that is scored."""
    videos: int | None
    """Number of videos, or of sets of images; None where no source states it."""
    license: str
    """Licence of the questions as their authors state it."""


BY_NC_SA = "CC-BY-NC-SA-4.0"
RESEARCH = "research use only"
NOT_STATED = "not stated"

BENCHMARKS = {
    "videomme": BenchmarkInfo(
        title="Video-MME",
        what="Four options; short, medium and long videos, with or without subtitles.",
        dataset="lmms-lab/Video-MME",
        questions=2700,
        videos=900,
        license=RESEARCH,
    ),
    "videomme-v2": BenchmarkInfo(
        title="Video-MME-v2",
        what="Eight options; the four questions about a video are scored as a group.",
        dataset="MME-Benchmarks/Video-MME-v2",
        questions=3200,
        videos=800,
        license=RESEARCH,
    ),
    "lvbench": BenchmarkInfo(
        title="LVBench",
        what="Videos of more than an hour on average; six abilities, several for a question.",
        dataset="zai-org/LVBench",
        questions=1549,
        videos=103,
        license=BY_NC_SA,
    ),
    "timescope": BenchmarkInfo(
        title="TimeScope",
        what="Short clips inserted in one minute to eight hours of other video.",
        dataset="Apollo-LMMs/TimeScope",
        questions=1500,
        videos=None,
        license=NOT_STATED,
    ),
    "longtimescope": BenchmarkInfo(
        title="LongTimeScope",
        what="Retrieval and synthesis of inserted clips in about ten hours of video.",
        dataset="Apollo-LMMs/LongTimeScope",
        questions=450,
        videos=None,
        license=NOT_STATED,
    ),
    "vnbench": BenchmarkInfo(
        title="VNBench",
        what="Retrieve, order and count needles; right only in all four orders of the options.",
        dataset="videoniah/VNBench",
        questions=5400,
        videos=1350,
        license=RESEARCH,
    ),
    "egoschema": BenchmarkInfo(
        title="EgoSchema",
        what="Five options, three minutes of egocentric video; a server scores the full set.",
        dataset="lmms-eval/egoschema",
        questions=5031,
        videos=5031,
        license="MIT",
    ),
    "videoeval-pro": BenchmarkInfo(
        title="VideoEval-Pro",
        what="Every question with and without options; free answers are exported for a judge.",
        dataset="TIGER-Lab/VideoEval-Pro",
        questions=1289,
        videos=None,
        license=NOT_STATED,
    ),
    "longvideo-reason": BenchmarkInfo(
        title="LongVideo-Reason",
        what="Reasoning about long video, the answer between tags.",
        dataset="LongVideo-Reason/longvideo-reason",
        questions=1000,
        videos=1000,
        license=NOT_STATED,
    ),
    "mlvu": BenchmarkInfo(
        title="MLVU",
        what="Nine tasks on long videos; generation tasks are exported for a judge.",
        dataset="MLVU/MVLU",
        questions=2175,
        videos=None,
        license=BY_NC_SA,
    ),
    "longvideobench": BenchmarkInfo(
        title="LongVideoBench",
        what="Referred reasoning; a random letter for replies without one.",
        dataset="longvideobench/LongVideoBench",
        questions=1337,
        videos=753,
        license=BY_NC_SA,
    ),
    "nextqa": BenchmarkInfo(
        title="NExT-QA",
        what="Multiple choice: causal, temporal, descriptive.",
        dataset="lmms-lab/NExTQA",
        questions=8564,
        videos=None,
        license=NOT_STATED,
    ),
    "vhs": BenchmarkInfo(
        title="Visual Haystacks",
        what="Single needle: yes or no about one image among many.",
        dataset="tsunghanwu/visual_haystacks",
        questions=1000,
        videos=None,
        license="MIT",
    ),
}
"""Name on the command line -> benchmark; its module has underscores in place of hyphens."""


def load_benchmark(name: str) -> ModuleType:
    """The module of a benchmark."""
    return import_module(f"lvctx.eval.benchmarks.{name.replace('-', '_')}")


def run_command(name: str) -> str:
    """The command that runs a benchmark."""
    return "lvctx videomme run" if name == "videomme" else f"lvctx bench {name} run"
