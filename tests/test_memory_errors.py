"""Memory that is used up, for real: one line, or the error of one cell, one question or one video."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import broken
from support.limited import fault, limited
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.errors import InputError, OutOfMemory, library_errors, memory_errors
from lvctx.inference import transformers_engine
from lvctx.inference.engine import EngineGone
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.parallel.ring_attention import Ring
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

USE_ALL: tuple[Callable[[], Any], ...] = (lambda: bytearray(1 << 62), lambda: torch.empty(1 << 50))
"""What Python and torch are asked for and no machine has."""


@pytest.mark.parametrize("use_all", USE_ALL)
def test_what_python_and_torch_raise(use_all: Callable[[], Any]) -> None:
    with pytest.raises(OutOfMemory) as caught, memory_errors(where="row 3", fix="use fewer"):
        use_all()
    assert (caught.value.where, caught.value.fix, caught.value.exit_code) == ("row 3", "use fewer", 3)
    with pytest.raises(OutOfMemory) as caught, memory_errors(fix="use fewer"), library_errors("unusable", where="f"):
        use_all()
    assert (caught.value.where, "\n" in str(caught.value)) == ("f", False)


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), InputError("kept")):
        with pytest.raises(type(error)) as caught, memory_errors():
            raise error
        assert caught.value is error


def test_a_cell_that_needs_too_much_is_a_row(tmp_path: Path) -> None:
    model = broken.save_lm(tmp_path / "lm", layers=1, intermediate=32_768)  # 0.5 GiB for one activation of 4,000 tokens
    (tmp_path / "essay.txt").write_text("The river was cold in spring. " * 150)
    grid = ("--lengths", "400,4000", "--depths", 0.5, "--trials", 1, "--prefill-chunk", 4000, "-q")
    files = ("--model", model, "--haystack", tmp_path / "essay.txt", "-o", tmp_path / "x")
    done = limited("niah", "text", *files, *grid, seconds=60, size=500 << 20)
    assert (done.returncode, fault(done)) == (4, "")
    rows = [json.loads(line) for line in (tmp_path / "x" / "results.jsonl").read_text().splitlines()]
    assert [(row["length"], "out of memory" in row.get("error", "")) for row in rows] == [(400, False), (4000, True)]


def test_a_command_without_memory_ends_in_a_line(tmp_path: Path) -> None:
    done = limited("perplexity", broken.save_lm(tmp_path / "lm"), "--data", tmp_path, size=1 << 20)
    assert (done.returncode, fault(done)) == (3, "")


@pytest.mark.nano
def test_a_question_about_a_video_that_needs_too_much(
    loud_vlm: Path, nano: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are answered."""
    prefill, asked = PrefixScorer.prefill, []

    def prefill_all_but_the_first(self: PrefixScorer, *arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 1:
            torch.empty(1 << 50)
        return prefill(self, *arguments)

    monkeypatch.setattr(PrefixScorer, "prefill", prefill_all_but_the_first)
    videos = [nano.clips / f"{name}.mp4" for name in ("bikes", "bigbuckbunny")]
    flags = ["--model", loud_vlm, "--frames", 2, "--ask", "What?", "--max-new-tokens", 2]
    done = CliRunner().invoke(app, [*map(str, ["vqa", *videos, *flags])])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.exit_code, ["error" in row for row in rows]) == (4, [True, False])
    assert videos[0].name in rows[0]["error"]


@pytest.mark.nano
def test_ranks_together_leave_nothing_out(loud_vlm: Path, nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of one question on one rank would leave the others waiting for it."""
    engine = TransformersEngine(open_vlm(str(loud_vlm)), device="cpu", ring=Ring(world=2))
    monkeypatch.setattr(engine.vlm, "load", lambda *_: torch.empty(1 << 50))
    with pytest.raises(EngineGone):
        engine.load([nano.clips / "bikes.mp4"], VideoSampling(frames=2))


@pytest.mark.nano
def test_a_model_that_does_not_fit_ends_the_run(loud_vlm: Path, nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not loaded again for every video."""
    loaded: list[object] = []
    monkeypatch.setattr(transformers_engine, "load_model", lambda *a, **b: (loaded.append(a), torch.empty(1 << 50)))
    videos = [nano.clips / f"{name}.mp4" for name in ("bikes", "bigbuckbunny")]
    done = CliRunner().invoke(app, [*map(str, ["vqa", *videos, "--model", loud_vlm, "--frames", 2, "--ask", "What?"])])
    assert (done.exit_code, done.stdout, len(loaded)) == (3, "", 1)
    assert "out of memory" in done.stderr
