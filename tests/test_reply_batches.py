"""Replies that are generated together equal those generated alone; videos are read one ahead."""

import itertools
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import generic_models, mrope_models
from support.costs import without_cost
from test_questions import DATA, rows_of, run
from test_unused_options import commands, refused
from torch import Tensor
from typer.testing import CliRunner

from lvctx.artifacts.result_log import read_results
from lvctx.cli.app import app
from lvctx.cost import CostMeter
from lvctx.errors import InputError, UsageError
from lvctx.inference.concurrency import read_ahead
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.open_engine import unused_options
from lvctx.inference.prefix_scorer import PrefixScorer
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def lm(request: pytest.FixtureRequest) -> Any:
    """A random language model whose greedy tokens differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("has_kernel", [True, False])
def test_greedy_ids_and_logits_are_those_of_a_stock_forward(
    lm: Any, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with and without a common prefix; some end early, and one by an id of its own."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 300, 30)
    prompts = [np.concatenate([base[:n], rng.integers(0, 300, k)]) for n, k in ((30, 3), (30, 9), (12, 2), (0, 50))]
    counts = (9, 3, 12, 6)
    if not has_kernel:
        monkeypatch.setattr("lvctx.inference.prefix_scorer.needs_no_mask", lambda lm, device: False)
    lm.set_attn_implementation("sdpa")

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        return lm(torch.tensor([ids]), use_cache=False).logits[0, -1]  # type: ignore[no-any-return]

    expected: list[list[int]] = []
    for prompt, count in zip(prompts, counts, strict=True):
        ids = prompt.tolist()
        for _ in range(count):
            ids.append(int(logits(ids).argmax()))
        expected.append(ids[len(prompt) :])
    stop = expected[2][4]
    expected[2] = expected[2][: expected[2].index(stop)]
    seen: list[list[Tensor]] = [[] for _ in prompts]

    def chooser(i: int) -> Any:
        return lambda logits_V: seen[i].append(logits_V) or int(logits_V.argmax())

    scorer = PrefixScorer(lm, chunk=16)
    asked = enumerate(zip(prompts, counts, strict=True))
    started = [scorer.prefill(p, n, [stop] if i == 2 else (), choose=chooser(i)) for i, (p, n) in asked]
    assert scorer.tokens_run < sum(map(len, prompts)), "the common prefix is computed once"
    assert scorer.decode(started) == expected
    lm.set_attn_implementation("sdpa")
    for prompt, ids, rows in zip(prompts, expected, seen, strict=True):
        stock = logits([*prompt.tolist(), *ids[: len(rows) - 1]])
        assert torch.allclose(rows[-1].log_softmax(0), stock.log_softmax(0), atol=1e-4)
    assert scorer.decode([scorer.prefill(prompts[3], 6, ())])[0] == expected[3], "what follows is computed as before"


def engine_of(path: Path, batch: int) -> TransformersEngine:
    """In float32; no token ends a reply."""
    engine = TransformersEngine(open_vlm(path), device="cpu", dtype="float32", prefill_chunk=40, batch=batch)
    engine.stop_ids = set()
    return engine


@pytest.fixture(scope="module")
def paths(loud_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("models")
    model = mrope_models.opinionated("qwen2_vl")
    model.save_pretrained(here / "qwen2_vl")
    mrope_models.save_processors("qwen2_vl", here / "qwen2_vl")
    return {
        "llava_onevision": loud_vlm,
        "qwen2_vl": here / "qwen2_vl",
        "llava": generic_models.save("llava", here / "llava"),
    }


@pytest.mark.nano
@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2_vl", "llava"])
def test_replies_about_different_images_do_not_depend_on_their_batch(kind: str, paths: dict[str, Path]) -> None:
    """Greedy and sampled, of different lengths, after prompts of different lengths and about two inputs."""
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 255, (40 + 30 * i, 60, 3), dtype=np.uint8)) for i in range(2)]
    params = [SamplingParams(max_new_tokens=n, temperature=t, seed=n) for n, t in ((3, 0), (11, 0), (7, 2.0), (5, 0))]
    asked = [(0, "What?"), (0, "What is on the road, and why?"), (1, "Who is it?"), (1, "Where?")]

    def replies(batch: int) -> list[tuple[Any, dict[str, Any]]]:
        engine, made, started = engine_of(paths[kind], batch), [], []
        for number, ((image, question), one) in enumerate(zip(asked, params, strict=True)):
            if number % 2 == 0:
                engine.show([images[image]], VideoSampling())
            started.append(engine.start_reply([question], one))
            if len(started) == batch:
                made += [(reply, engine.meter.take()["cost"]) for reply in engine.finish_replies(started)]
                started = []
        return made

    alone, together = replies(1), replies(4)
    assert [reply for reply, _ in together] == [reply for reply, _ in alone]
    assert [reply.tokens for reply, _ in together] == [3, 11, 7, 5]
    assert len({reply.text for reply, _ in together}) == 4
    seconds = [cost["generate_seconds"] for _, cost in together]
    assert seconds == pytest.approx([sum(seconds) * n / 26 for n in (3, 11, 7, 5)], abs=1e-5)
    for key in ("tokens_in", "tokens_out", "visual_tokens"):
        assert [cost[key] for _, cost in together] == [cost[key] for _, cost in alone]


# --- commands


@pytest.fixture(scope="module")
def videos(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos and a damaged one between them, and questions about all three."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("bikes", "bigbuckbunny"):
        (folder / f"{name}.mp4").symlink_to(nano.clips / f"{name}.mp4")
    (folder / "broken.mp4").write_bytes((nano.clips / "bikes.mp4").read_bytes()[:50_000])
    questions = json.loads((DATA / "questions.json").read_text())
    broken = [{**q, "videoID": "broken", "video_id": "b", "question_id": f"b-{i}"} for i, q in enumerate(questions[:2])]
    (folder / "questions.json").write_text(json.dumps([*questions[:3], *broken, *questions[3:]]))
    return folder


def asked_of(model: Path, videos: Path, out: Path, *more: object) -> tuple[object, ...]:
    inputs = ("--model", model, "--videos", videos, "--questions", videos / "questions.json", "--frames", 2)
    return ("videomme", "run", *inputs, "--max-new-tokens", 5, "-o", out, *more)


@pytest.mark.nano
def test_a_benchmark_in_batches_has_the_same_rows(
    paths: dict[str, Path], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch has questions about both videos. A damaged one stays in its place; a batch without memory is repeated."""
    plain = run(*asked_of(paths["qwen2_vl"], videos, tmp_path / "plain"))
    assert plain.exit_code == 4, plain.output
    rows = rows_of(plain)
    assert ["error" in row for row in rows] == [False] * 3 + [True] * 2 + [False] * 3
    assert len({row["response"] for row in rows if "error" not in row}) == 6
    sizes: list[int] = []
    decode = PrefixScorer.decode

    def counted(self: PrefixScorer, continuations: Any) -> Any:
        sizes.append(len(continuations))
        if sizes == [4]:
            raise torch.OutOfMemoryError("no memory for four")
        return decode(self, continuations)

    monkeypatch.setattr(PrefixScorer, "decode", counted)
    flags = asked_of(paths["qwen2_vl"], videos, tmp_path / "batches", "--batch", 4)
    first = run(*flags)
    assert (first.exit_code, sizes) == (4, [4, 2])
    failed = [row for row in rows_of(first) if "no memory for four" in row.get("error", "")]
    assert [row["id"] for row in failed] == [row["id"] for row in rows if "error" not in row][:4]
    assert sum(row["cost"]["frames_decoded"] for row in failed) > 0
    again = run(*flags)
    assert (again.exit_code, sizes) == (4, [4, 2, 4])
    stored = {row["key"]: row for row in read_results(tmp_path / "batches").values()}
    assert without_cost(stored[row["key"]] for row in rows) == without_cost(rows)
    assert [row["id"] for row in rows_of(again)] == [row["id"] for row in rows[:6]]
    assert rows_of(again)[0]["cost"]["frames_decoded"] > 0


@pytest.mark.nano
def test_answers_about_several_videos(paths: dict[str, Path], videos: Path) -> None:
    """Of lines from a pipe; one has no question, one no video that can be read."""
    names = ("bikes", "bikes", "broken", "bigbuckbunny", "bikes")
    asked = ("What is it?", "Why?", "Who?", "", "Where is it?")
    lines = [
        {"path": str(videos / f"{n}.mp4"), "question": q, "id": i}
        for i, (n, q) in enumerate(zip(names, asked, strict=True))
    ]
    given = "\n".join(map(json.dumps, lines))
    flags = ("vqa", "-", "--model", paths["qwen2_vl"], "--frames", 2, "--max-new-tokens", 4)
    plain, batch = (CliRunner().invoke(app, [*map(str, flags), *more], input=given) for more in ([], ["--batch", "4"]))
    assert (plain.exit_code, batch.exit_code) == (4, 4), plain.output
    rows = rows_of(batch)
    assert without_cost(rows) == without_cost(rows_of(plain))
    assert [(row["id"], "error" in row) for row in rows] == [(0, False), (1, False), (2, True), (3, True), (4, False)]
    assert len({row["answer"] for row in rows if "answer" in row}) > 1
    cost = [row["cost"] for row in rows]
    assert [c["frames_decoded"] > 0 for c in cost] == [True, False, False, False, True]
    assert cost[2]["decode_seconds"] > 0


def test_batches_that_cannot_be(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        EngineConfig(batch=2, cp=2)
    assert "--chat" in refused((*commands(paths["llava"], tmp_path)["vqa"], "--chat", "--batch", "2"))
    windows = shutil.copytree(paths["llava"], tmp_path / "windows")
    config = json.loads((windows / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 16}
    (windows / "config.json").write_text(json.dumps(config))
    assert unused_options(open_vlm(windows)) == ["batch", "feature_cache"]
    assert "--batch" in refused((*commands(windows, tmp_path)["vqa"], "--batch", "2"))


# --- reading ahead


def test_one_item_is_read_ahead_and_its_error_is_its_own() -> None:
    meter, events, read_two = CostMeter(), list[str](), threading.Event()
    engine: Any = SimpleNamespace(reads_ahead=True, meter=meter)

    def read(item: int) -> int:
        events.append(f"read {item}")
        with meter.phase("decode"):
            time.sleep(0.01)
        if item == 2:
            read_two.set()
        if item == 1:
            raise InputError("damaged")
        return item

    used = []
    for item, use in read_ahead(range(4), read, lambda value: used.append(value), engine):
        assert f"read {item + 2}" not in events, "only one ahead"
        if item == 1:
            with pytest.raises(InputError):
                use()
            assert read_two.wait(10), "while the caller works"
        else:
            use()
        assert meter.take()["cost"]["decode_seconds"] >= 0.01
    assert used == [0, 2, 3]
    assert events[0] == "read 0"


def test_a_source_that_fails_and_an_engine_that_does_not_read_ahead() -> None:
    def source() -> Any:
        yield 1
        yield 2
        raise InputError("the end of the list is damaged")

    for ahead in (True, False):
        engine: Any = SimpleNamespace(reads_ahead=ahead, meter=CostMeter())
        items = read_ahead(source(), lambda item: (item, threading.get_ident()), tuple, engine)
        threads = [use()[1] for _, use in itertools.islice(items, 2)]
        assert [one == threading.get_ident() for one in threads] == [True, not ahead]
        with pytest.raises(InputError):
            next(items)
