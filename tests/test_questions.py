"""Running benchmarks: replies equal plain generation, frames are read once, broken videos are never asked about."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from support import aligning
from support.refusals import refused
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.eval.benchmarks import longvideobench, mlvu, nextqa, vhs, videomme
from lvctx.eval.benchmarks.answers import Question
from lvctx.eval.benchmarks.subtitles import read_subtitles
from lvctx.eval.benchmarks.videomme import prompt
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.inference.video_questions import VideoQuestions
from lvctx.models.loading import load_config
from lvctx.models.vlm_assembly import ImageGrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm

DATA = Path(__file__).parent / "data"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def rows_of(done: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def clips(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    (out / "below").mkdir()
    shutil.copy(nano.clips / "bikes.mp4", out / "below")
    shutil.copy(nano.clips / "bigbuckbunny.mp4", out)
    return out


@pytest.fixture(scope="module")
def finished(
    loud_vlm: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("run") / "out"
    done = run(*asked(loud_vlm, clips, out))
    assert done.exit_code == 0, done.output
    return out, rows_of(done)


class PlainModel:
    """Stock transformers: one `generate` a question, nothing shared."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

        self.path = path
        self.vlm = LlavaOnevisionForConditionalGeneration.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def answer(self, frames: Path, turns: list[str], count: int) -> tuple[str, int]:
        from lvctx.models.vlm_assembly import embed_frames, newline_embedding
        from lvctx.vlm.feature_cache import read_feature_cache

        cache = read_feature_cache(frames)
        block = torch.cat([embed_frames(self.vlm, cache.features, cache.grid), newline_embedding(self.vlm)])
        return self.answer_about(block, turns, count)

    @torch.no_grad()
    def picture_blocks(self, pictures: list[Image.Image], grid: ImageGrid) -> torch.Tensor:
        """What stock transformers' own image path (AnyRes) or video path embeds."""
        from lvctx.models.image_processing import Preprocess
        from lvctx.vlm.image_tiling import ImageEncoding

        config, preprocess = self.vlm.config, Preprocess.from_directory(self.path)
        encoding = ImageEncoding.of(config.vision_config, grid=grid, rule="code")
        alone = len(pictures) == 1
        tiles = [preprocess(encoding.tiles(p, alone=alone, background=preprocess.background)) for p in pictures]
        if grid == "anyres":
            sizes = torch.tensor([p.size[::-1] for p in pictures])
            count = torch.tensor([len(pictures)])
            seen = self.vlm.model.get_image_features(torch.stack(tiles), sizes, batch_num_images=count)
            return torch.cat(list(seen.pooler_output))
        return torch.cat([self.vlm.model.get_video_features(t[None]).pooler_output[0] for t in tiles])

    @torch.no_grad()
    def answer_about(self, block: torch.Tensor, turns: list[str], count: int) -> tuple[str, int]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        messages[0]["content"] = "<video>" + turns[0]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, after = (torch.tensor(self.tokenizer.encode(t), dtype=torch.long) for t in text.split("<video>"))
        embed = self.vlm.get_input_embeddings()
        whole = torch.cat([embed(before), block, embed(after)])[None]
        mask = torch.ones(whole.shape[:2], dtype=torch.long)
        out = self.vlm.generate(inputs_embeds=whole, attention_mask=mask, do_sample=False, max_new_tokens=count)
        return self.tokenizer.decode(out[0], skip_special_tokens=True).strip(), whole.shape[1]


def asked(loud_vlm: Path, clips: Path, out: Path, questions: Path = DATA / "questions.json") -> list[object]:
    where = ["--model", loud_vlm, "--videos", clips, "--questions", questions, "-o", out]
    return ["videomme", "run", *where, "--frames", 6, "--max-new-tokens", 6]


@pytest.mark.nano
def test_replies_are_those_of_plain_generation_with_all_that_decided_them(
    finished: tuple[Path, list[dict[str, Any]]], loud_vlm: Path
) -> None:
    out, rows = finished
    assert [row["id"] for row in rows] == ["001-1", "001-2", "001-3", "002-1", "002-2", "002-3"]
    plain = PlainModel(loud_vlm)
    samples = {s.id: s for s in videomme.samples(DATA / "questions.json")}
    for row in rows:
        frames = out / "frames" / f"{row['video']}.frames.safetensors"
        text, tokens = plain.answer(frames, [prompt(samples[row["id"]], "official", None)], 6)
        assert (row["response"], row["tokens"], row["frames"]) == (text, tokens, 6)
    assert len({row["response"] for row in rows}) > 1, "a model whose replies tell runs apart"
    row = rows[0]
    assert row["made_of"]["sampling"]["frames"] == 6
    assert row["made_of"]["sampling"]["frame_mode"] == "crop"
    assert row["made_of"]["dtype"] == "float32"
    assert len({row["prompt_sha256"] for row in rows}) == 6
    assert row["made_of"]["style"] == "official"


@pytest.mark.nano
def test_the_official_file_is_exact_and_scored_unchanged(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = finished
    text = (out / "responses.json").read_text()
    videos = json.loads(text)
    assert [list(v) for v in videos] == [["video_id", "duration", "domain", "sub_category", "questions"]] * 2
    fields = ["question_id", "task_type", "question", "options", "answer", "response"]
    assert all(list(q) == fields for v in videos for q in v["questions"])
    assert [q["response"] for v in videos for q in v["questions"]] == [row["response"] for row in rows]
    scored = rows_of(run("videomme", "score", out, "--json"))[0]
    assert scored["questions"] == 6
    assert scored["overlooked"] == {}


@pytest.mark.nano
def test_frames_are_read_once_for_three_questions(loud_vlm: Path, finished: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = finished
    samples = videomme.samples(DATA / "questions.json")[:3]
    replies = {}
    for reuse in (True, False):
        engine = TransformersEngine(open_vlm(loud_vlm), device="cpu", prefill_chunk=50, reuse=reuse)
        engine.show([out / "frames" / "bikes.frames.safetensors"], VideoSampling())
        ids = [engine.prompt_ids([prompt(sample, "official", None)]) for sample in samples]
        replies[reuse] = [engine.finish([engine.start(one, 6)])[0] for one in ids]
        if reuse:
            shared = min(int(np.flatnonzero(ids[0][: len(b)] != b[: len(ids[0])])[0]) for b in ids[1:])
            assert engine.scorer.tokens_run <= sum(map(len, ids)) - 2 * shared + 3 * 6
            assert shared > 6 * 4
        else:
            assert engine.scorer.tokens_run >= sum(map(len, ids))
    assert replies[True] == replies[False]


@pytest.mark.nano
def test_a_run_continues_where_it_stopped_and_a_finished_one_does_nothing(
    finished: tuple[Path, list[dict[str, Any]]], loud_vlm: Path, clips: Path, tmp_path: Path
) -> None:
    out, _ = finished
    half = tmp_path / "half"
    half.mkdir()
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    (half / "results.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    done = run(*asked(loud_vlm, clips, half), "--feature-cache", out / "frames")
    assert [row["id"] for row in rows_of(done)] == ["001-3", "002-1", "002-2", "002-3"]
    assert (half / "responses.json").read_bytes() == (out / "responses.json").read_bytes()
    assert rows_of(run(*asked(loud_vlm, clips, out))) == []
    other = run(*asked(loud_vlm, clips, out), "--prompt", "lmms-eval")
    assert other.exit_code == 3
    assert "other prompt, style" in other.stderr


@pytest.mark.nano
def test_a_broken_video_is_an_error_and_a_smaller_denominator(loud_vlm: Path, clips: Path, tmp_path: Path) -> None:
    broken = tmp_path / "clips"
    broken.mkdir()
    whole = (clips / "bigbuckbunny.mp4").read_bytes()
    (broken / "bigbuckbunny.mp4").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    nothing = run(*asked(loud_vlm, broken, out))
    assert nothing.exit_code == 4
    rows = rows_of(nothing)
    assert all("response" not in row for row in rows)
    assert "no video bikes" in rows[0]["error"]
    assert "cut short" in rows[3]["error"]
    assert "0 of 6 questions answered" in nothing.stderr
    assert json.loads((out / "responses.json").read_text()) == []
    (broken / "bigbuckbunny.mp4").write_bytes(whole)
    some = run(*asked(loud_vlm, broken, out))
    assert some.exit_code == 4
    assert "3 of 6 questions answered" in some.stderr
    assert rows_of(run("videomme", "score", out, "--json"))[0]["questions"] == 3


@pytest.mark.nano
def test_frames_of_two_resolutions(loud_vlm: Path, clips: Path, tmp_path: Path) -> None:
    """Of every three frames one has 4 tokens and two have 2, and the replies are plain generation's about these."""
    out = tmp_path / "out"
    done = run(*asked(loud_vlm, clips, out), "--hybrid", "3,4,2")
    assert done.exit_code == 0, done.output
    plain = PlainModel(loud_vlm)
    samples = {s.id: s for s in videomme.samples(DATA / "questions.json")}
    for row in rows_of(done):
        assert (row["visual_tokens"], row["made_of"]["sampling"]["hybrid"]) == (2 * 4 + 4 * 2, [3, 4, 2])
        frames = out / "frames" / f"{row['video']}.frames.safetensors"
        text, tokens = plain.answer(frames, [prompt(samples[row["id"]], "official", None)], 6)
        assert (row["response"], row["tokens"]) == (text, tokens)
    for flags, words in (
        (("--hybrid", "3,5,2"), "m is 4"),
        (
            ("--hybrid", "3,4,2", "--hybrid-mode", "image"),
            "--hybrid-mode: a CLIP or SigLIP tower does not merge frames",
        ),
        (("--fps", 1), "not both"),
    ):
        refused = run(*asked(loud_vlm, clips, tmp_path / "no"), *flags)
        assert (refused.exit_code, words in refused.stderr) == (2, True), refused.stderr


@pytest.mark.nano
def test_a_prompt_too_long_is_an_error(loud_vlm: Path, clips: Path, tmp_path: Path) -> None:
    done = run(*asked(loud_vlm, clips, tmp_path / "out"), "--max-new-tokens", 2000)
    assert done.exit_code == 4
    assert "exceed the model's context of 2048" in rows_of(done)[0]["error"]


def test_a_language_model_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    done = run(*asked(tiny_lm, tmp_path, tmp_path / "out"))
    assert done.exit_code == 2, "as by vqa"
    assert "is a language model and has no vision tower" in done.stderr


def test_questions_in_every_released_form_are_the_same(tmp_path: Path) -> None:
    rows = json.loads((DATA / "questions.json").read_text())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    repository = tmp_path / "Video-MME"
    (repository / "videomme").mkdir(parents=True)
    (repository / ".cache").mkdir()
    (repository / ".cache" / "other.json").write_text("{}")
    shutil.copy(tmp_path / "q.parquet", repository / "videomme" / "test-00000-of-00001.parquet")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=saved).save_to_disk(tmp_path / "splits")
    expected = [(s.id, s.video, s.options, s.answer) for s in videomme.samples(DATA / "questions.json")]
    for name in ("q.parquet", "q.jsonl", "Video-MME", "saved", "splits"):
        assert [(s.id, s.video, s.options, s.answer) for s in videomme.samples(tmp_path / name)] == expected
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1")
    for bad in ("bad.parquet", "bad.arrow"):
        with refused(InputError, bad):
            videomme.samples(tmp_path / bad)


REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(cache: Path, repository: str, file: str) -> None:
    """The hub's own layout with the test's questions as `file`: a blob, a snapshot that links to it, the branch."""
    rows = json.loads((DATA / "questions.json").read_text())
    home = cache / f"datasets--{repository.replace('/', '--')}"
    snapshot, blob = home / "snapshots" / REVISION / file, home / "blobs" / "b10b"
    for folder in (snapshot.parent, blob.parent, home / "refs"):
        folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), blob)
    snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
    (home / "refs" / "main").write_text(REVISION)


@pytest.mark.nano
def test_questions_from_the_hub(loud_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client: what its cache holds is found without network, and what it does not is one line and 3."""
    from huggingface_hub import constants

    file = "videomme/test-00000-of-00001.parquet"
    hub_cache(tmp_path / "cache", "lmms-lab/Video-MME", file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    flags = ("--model", loud_vlm, "--videos", tmp_path, "-o", tmp_path / "out", "--dry-run", "--questions")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for questions in ("hub", "lmms-lab/Video-MME", f"lmms-lab/Video-MME/{file}"):
        found = run("videomme", "run", *flags, questions)
        assert found.exit_code == 0, found.output
        assert rows_of(found)[0]["questions"] == 6
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    gone = run("videomme", "run", *flags, "hub")
    assert (gone.exit_code, gone.stdout) == (3, "")
    assert gone.stderr.startswith("lvctx: hub: neither a local file nor")
    assert gone.stderr.count("\n") == 1
    nowhere = run("videomme", "run", *flags, "./no/such/file.json")
    assert (nowhere.exit_code, "no such file" in nowhere.stderr) == (3, True)


# --- prompts and subtitles


ONE = Question(id="1", video="v", question="Who?", options=("A. I.", "B. You.", "C. He.", "D. She."), answer="A")


def test_the_official_prompt_is_the_papers() -> None:
    assert prompt(ONE, "official", None) == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWho?\nA. I.\nB. You.\nC. He.\nD. She.\nThe best answer is:"
    )
    assert prompt(ONE, "official", "Hello.").startswith(
        "This video's subtitles are listed below:\nHello.\nSelect the best"
    )
    assert prompt(ONE, "vlmevalkit", None).endswith(
        "option.\nQuestion: Who?\nA. I.\nB. You.\nC. He.\nD. She.\nAnswer: "
    )
    assert prompt(ONE, "lmms-eval", None).endswith(
        "D. She.\n\nAnswer with the option's letter from the given choices directly."
    )
    assert "No subtitles available" in prompt(ONE, "lmms-eval", "")


def test_subtitles_only_where_frames_are_and_bad_ones_counted(tmp_path: Path) -> None:
    file = tmp_path / "v.srt"
    file.write_bytes(
        b'\xef\xbb\xbf1\r\n00:00:01,000 --> 00:00:02,500\r\n<font size=".7c">Good &amp; morning.</font>\r\n\r\n'
        b"2\r\n00:00:02.5 --> 00:00:04,000\r\nTwo\r\nlines.\r\n\r\n"
        b"3\r\nnot a time\r\nlost\r\n\r\n"
        b"4\r\n00:00:09,000 --> 00:00:08,000\r\nbackwards\r\n\r\n"
        b"00:01:00,000 --> 00:01:10,000\r\nno number \xff\r\n"
    )
    found = read_subtitles(file)
    assert found.bad == 3
    assert found.at([0.0, 0.9]) == ""
    assert found.at([1.0, 2.4]) == "Good & morning."
    assert found.at([3.0, 2.0]) == "Good & morning.\nTwo lines."
    assert found.at([2.5]) == "Two lines."
    assert found.at([65]) == "no number \ufffd"
    assert read_subtitles(tmp_path / "none.srt").lines == ()


@pytest.mark.nano
def test_subtitles_of_a_run(loud_vlm: Path, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / "bikes.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nRide on.\n\n2\nbad\n")
    done = run(*asked(loud_vlm, clips, tmp_path / "out"), "--subtitles", tmp_path / "srt")
    rows = rows_of(done)
    assert [(row["subtitle_lines"], row["bad_subtitles"]) for row in rows] == [(1, 1)] * 3 + [(0, 0)] * 3


# --- neighbours


def row_of(sample: Question, response: str) -> dict[str, Any]:
    letters = "".join(chr(65 + i) for i in range(len(sample.options)))
    shared = {"id": sample.id, "video": sample.video, "answer": sample.answer, "groups": dict(sample.groups)}
    return {**shared, "letters": letters, "response": response}


def test_mlvu_macro_and_pooled_and_generation_for_a_judge(tmp_path: Path) -> None:
    questions = [
        {"video": f"{t}{i}.mp4", "question": "q?", "candidates": ["w", "x", "y"], "answer": "x", "question_type": t}
        for t, n in (("plotQA", 4), ("count", 1))
        for i in range(n)
    ]
    summary = {"video": "s.mp4", "question": "Summarize.", "answer": "All of it.", "question_type": "summary"}
    (tmp_path / "q.json").write_text(json.dumps([*questions, summary]))
    samples = mlvu.samples(tmp_path / "q.json")
    assert samples[0].answer == "B"
    assert mlvu.prompt(samples[0], "lmms-eval", None) == (
        "Question: q?\nOptions:\n(A) w\n(B) x\n(C) y\nOnly give the best option.\nBest option: ("
    )
    assert samples[5].max_new_tokens == 1000
    said = ["B) x", "B", "B.", "A", "C", "A long story."]
    found = mlvu.score([row_of(s, r) for s, r in zip(samples, said, strict=True)])
    assert found["m_avg"]["lmms-eval"]["pooled"] == pytest.approx(3 / 5)
    assert found["m_avg"]["lmms-eval"]["macro"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["generated"] == 1
    mlvu.export(tmp_path, list(zip(samples, said, strict=True)))
    judged = json.loads((tmp_path / "summary_all.json").read_text())
    assert judged == [{"video_name": "s.mp4", "Q": "Summarize.", "A": "All of it.", "pred": "A long story."}]


def test_longvideobench_guesses_with_a_seed(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i),
            "video_path": f"{i}.mp4",
            "question": "q?",
            "candidates": ["w", "x", "y"],
            "correct_choice": 1,
            "duration_group": 15,
            "question_category": "S2E",
            "topic_category": "KH",
        }
        for i in range(300)
    ]
    (tmp_path / "lvb.json").write_text(json.dumps(rows))
    samples = longvideobench.samples(tmp_path / "lvb.json")
    assert (samples[0].options, samples[0].answer) == (("A. w", "B. x", "C. y"), "B")
    mute = [row_of(s, "i do not know") for s in samples]
    first, again, other = (longvideobench.score(mute, seed=n)["guessing"] for n in (0, 0, 1))
    assert first == again != other
    assert first["guessed"] == 300
    assert first["mean"] == pytest.approx(1 / 3, abs=0.1)
    right = longvideobench.score([row_of(s, "Best answer: B") for s in samples])
    assert right["guessing"]["mean"] == 1.0
    assert right["guessing"]["guessed"] == 0


def test_nextqa_by_kind() -> None:
    samples = nextqa.samples(DATA / "nextqa.csv")
    assert samples[1].options[3] == "D. to be safe"
    found = nextqa.score([row_of(samples[0], "B"), row_of(samples[1], "A. to sing")])
    assert found["by_kind"]["descriptive"]["strict"]["mean"] == 1.0
    assert found["by_kind"]["causal"]["strict"]["mean"] == 0.0


def haystack(folder: Path, sizes: tuple[int, ...]) -> None:
    """Noise in 0.png to 4.png, wide, and a question about so many of them."""
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    questions = [
        {
            "conversations": [{"from": "human", "value": "Is there a dog?"}, {"from": "gpt", "value": answer}],
            "pos_image": ["0.png"],
            "neg_image": [f"{i}.png" for i in range(1, n)],
        }
        for n, answer in zip(sizes, ("yes", "no", "no"), strict=False)
    ]
    (folder / "q").mkdir()
    (folder / "q" / "visual_haystack_2.json").write_text(json.dumps(questions))


@pytest.mark.nano
@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        # The tower has 4 x 4 features a tile of 48 pixels, and a picture is two tiles wide: one picture, then three.
        ("unires", (2 * 4 + 1, 3 * (2 * 4 + 1))),
        ("anyres", (16 + 4 * (8 + 1), 3 * (16 + 1))),
        ("single", (4 + 1, 3 * (4 + 1))),
    ],
)
def test_images_are_encoded_as_in_training(
    grid: ImageGrid, tokens: tuple[int, int], loud_vlm: Path, tmp_path: Path
) -> None:
    """Replies and lengths are those of stock transformers' own image and video paths."""
    from lvctx.vlm.image_tiling import ImageEncoding

    model = tmp_path / "vlm"
    shutil.copytree(loud_vlm, model)
    config = load_config(model)
    ImageEncoding.of(config.vision_config, grid=grid, rule="code").write_to(config)
    config.save_pretrained(model)
    haystack(tmp_path, (1, 3))
    where = ("--model", model, "--videos", tmp_path, "--questions", tmp_path / "q")
    done = run("bench", "vhs", "run", *where, "--max-new-tokens", 4, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    plain = PlainModel(model)
    for row, sample, count in zip(rows_of(done), vhs.samples(tmp_path / "q"), tokens, strict=True):
        pictures = [Image.open(tmp_path / name).convert("RGB") for name in sample.images]
        block = plain.picture_blocks(pictures, grid)
        assert row["made_of"]["sampling"] == {"image_encoding": grid, "unires_rule": "code", "max_grids": 49}
        assert row["visual_tokens"] == len(block) == count
        text, length = plain.answer_about(block, [vhs.prompt(sample, "official", None)], 4)
        assert (row["response"], row["tokens"]) == (text, length)
    assert run("bench", "vhs", "run", *where, "-o", tmp_path / "other", "--frames", 8).exit_code == 2


@pytest.mark.nano
def test_placeholders_in_a_question_are_text_beside_images(loud_vlm: Path) -> None:
    engine = TransformersEngine(open_vlm(loud_vlm), device="cpu")
    engine.show([Image.new("RGB", (48, 48))] * 2, VideoSampling())
    prompt = engine.prompt_ids(["Is <image> or <video> first?"]).tolist()
    text = [i for i in prompt if i < engine.vlm.vocabulary]
    assert len(prompt) - len(text) == 2 * (2 * 4 + 1)
    assert not {*engine.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])} & {*text}
    assert "Is <image> or <video> first?" in engine.tokenizer.decode(text)


@pytest.mark.nano
def test_the_rule_of_unires_is_the_alignments(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    from lvctx.vlm.image_tiling import ImageEncoding

    aligning.draw(tmp_path)
    data = aligning.write(tmp_path / "data.json", [aligning.talk("<image>What?", "red", image="0.png")])
    aligning.align(data, tmp_path / "vlm", tiny_lm, tiny_tower, unires_rule="paper", steps=1)
    (tmp_path / "vlm" / "MANIFEST.json").unlink()
    assert ImageEncoding.from_config(load_config(tmp_path / "vlm")).rule == "paper"


@pytest.mark.nano
def test_visual_haystacks_end_to_end(loud_vlm: Path, tmp_path: Path) -> None:
    haystack(tmp_path, (2, 5, 3))
    questions = json.loads((tmp_path / "q" / "visual_haystack_2.json").read_text())
    questions[2]["neg_image"] = ["gone.png"]
    (tmp_path / "q" / "visual_haystack_2.json").write_text(json.dumps(questions))
    out = tmp_path / "out"
    where = ("--model", loud_vlm, "--videos", tmp_path, "--questions", tmp_path / "q", "-o", out)
    done = run("bench", "vhs", "run", *where, "--max-new-tokens", 4)
    assert done.exit_code == 4
    rows = rows_of(done)
    assert [row.get("images") for row in rows] == [2, 5, None]
    assert "gone.png" in rows[2]["error"]
    assert rows_of(run("bench", "vhs", "score", out, "--json"))[0]["failed"] == 1


def test_effective_length() -> None:
    rows = [
        {
            "id": f"{n}-{i}",
            "answer": "yes",
            "response": "Yes, it is." if i < right else "No.",
            "groups": {"images": str(n)},
        }
        for n, right in ((1, 10), (10, 7), (50, 6), (100, 5))
        for i in range(10)
    ]
    found = vhs.score(rows)
    assert found["effective_length"] == 50
    assert found["by_images"]["100"]["words"]["mean"] == 0.5
    assert found["rules"]["words"]["parsed"] == 1.0


@pytest.mark.nano
def test_nextqa_runs_and_scores_from_the_command_line(
    loud_vlm: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    where = ("--model", loud_vlm, "--videos", clips, "--questions", DATA / "nextqa.csv", "-o", out)
    assert run("bench", "nextqa", "run", *where, "--frames", 4).exit_code == 0
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)
    text = run("bench", "nextqa", "score", out).stdout
    assert "2 questions" in text
    assert "kind: causal" in text
    assert run("bench", "mlvu", "score", out).exit_code == 3
    assert run("bench", "nextqa", "run", *where, "--subtitles", tmp_path).exit_code == 2
    with open(DATA / "nextqa.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 2


@pytest.mark.nano
def test_a_chat_keeps_what_it_has_read(finished: tuple[Path, list[dict[str, Any]]], loud_vlm: Path) -> None:
    """Each turn is what stock generation says of the whole conversation, and the frames run once."""
    frames = finished[0] / "frames" / "bikes.frames.safetensors"
    questions = ["What is it?", "And where?", "Why do they ride?"]
    done = CliRunner().invoke(
        app,
        ["vqa", str(frames), "--model", str(loud_vlm), "--chat", "--ask", questions[0], "--max-new-tokens", "5"],
        input="\n".join(["", *questions[1:]]) + "\n",
        catch_exceptions=False,
    )
    rows = rows_of(done)
    assert [row["question"] for row in rows] == questions
    plain, turns = PlainModel(loud_vlm), list[str]()
    for row in rows:
        turns.append(row["question"])
        assert plain.answer(frames, turns, 5) == (row["answer"], row["tokens"])
        turns.append(row["answer"])
    assert rows[2]["tokens"] > rows[1]["tokens"] > rows[0]["tokens"]
    engine = TransformersEngine(open_vlm(loud_vlm), device="cpu")
    heard: list[str] = []
    chat = VideoQuestions(engine, VideoSampling(), params=SamplingParams(max_new_tokens=5), on_text=heard.append)
    answers = list(chat.chat(frames, questions))
    assert [a.text for a in answers] == [row["answer"] for row in rows]
    assert heard[-1] == answers[-1].text
    assert engine.scorer.tokens_run < rows[2]["tokens"] + 3 * (5 + 5 + 1)
    assert run("vqa", frames, "--model", loud_vlm).exit_code == 2
    assert run("vqa", frames, frames, "--chat", "--model", loud_vlm).exit_code == 2
