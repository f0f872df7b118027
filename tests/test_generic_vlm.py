"""Any class of vision-language models: prompts, logits and replies are stock transformers' own, in every command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import generic_models, generic_parity
from support.generic_models import FORWARD, KINDS, STOCK_IMAGES
from support.generic_parity import NO_MIXTURE
from support.model_table import model_table
from support.refusals import refused
from test_niah import run
from test_qwen_niah import fails

from lvctx.errors import InputError, MissingError, UsageError
from lvctx.models.loading import load_config
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.haystack_files import FrameFile
from lvctx.vlm.registry import GENERIC, open_vlm, support_of
from lvctx.vlm.stock_prompt import Clip

DATA = Path(__file__).parent / "data"
WITH_VIDEO = {"llava_next_video", "video_llava", "internvl", "smolvlm", "perception_lm", "qwen3_5", "glm4v"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generic")


@pytest.fixture(scope="module")
def clip_questions(folder: Path) -> Path:
    questions = json.loads((DATA / "questions.json").read_text())
    file = folder / "questions.json"
    file.write_text(json.dumps([question for question in questions if "bikes" in json.dumps(question)]))
    return file


@pytest.fixture(scope="module")
def measured(folder: Path, clip_questions: Path, nano: Any) -> dict[str, list[dict[str, Any]]]:
    """Each class beside stock, in a process that has torchvision."""
    if not generic_parity.packages():
        pytest.skip("no torchvision for this torch can be installed here")
    command = [sys.executable, generic_parity.__file__, folder, nano.clips / "bikes.mp4", clip_questions]
    done = subprocess.run(
        [*map(str, command), *KINDS, *FORWARD, *STOCK_IMAGES],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {kind: [row for row in rows if row["kind"] == kind] for kind in (*KINDS, *FORWARD, *STOCK_IMAGES)}


@pytest.fixture(scope="module")
def llava(folder: Path) -> Path:
    return generic_models.save("llava", folder / "llava-here")


def test_every_class_of_the_registry_is_compared() -> None:
    assert set(KINDS) == set(GENERIC)


@pytest.mark.nano
@pytest.mark.parametrize("kind", [*KINDS, *FORWARD])
def test_prompts_logits_and_replies_equal_stock(kind: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row for row in measured[kind] if "command" not in row]
    assert not [row["failed"] for row in rows if "failed" in row]
    video = ["video", "mixed"] if kind in WITH_VIDEO else []
    shown = ["image", "images", *video, "haystack"]
    assert [row["shown"] for row in rows] == [one for one in shown if one != "mixed" or kind not in NO_MIXTURE]
    for row in rows:
        assert row["same_ids"], row
        assert row["error"] < 1e-4, row
        assert row["same_reply"], row
        assert row["placeholders"] > 0, row
    assert rows[-1]["shared"] == (kind in KINDS)


@pytest.mark.nano
def test_images_of_a_stock_llava_onevision_are_its_processors(measured: dict[str, list[dict[str, Any]]]) -> None:
    """One image in AnyRes grids, interpolated where they are more than nine; several as one grid each."""
    rows = measured["llava_onevision"]
    assert not [row["failed"] for row in rows if "failed" in row]
    assert [row["shown"] for row in rows] == ["image", "large", "images"]
    for row in rows:
        assert row["same_ids"], row
        assert row["error"] < 1e-4, row
        assert row["same_reply"], row


@pytest.mark.nano
@pytest.mark.parametrize("kind", generic_parity.COMMANDED)
def test_commands_take_them(kind: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    vqa, niah, videomme, sampled = (row for row in measured[kind] if "command" in row)
    assert sampled["exit"] == 0, sampled["stderr"]
    first, second = (row["answer"] for row in sampled["rows"])
    assert first == second != "", "each reply begins at --seed"
    assert not first.startswith(vqa["rows"][0]["answer"] or " "), "not the greedy reply"
    check_commands(vqa, niah, videomme, reuse="none" if kind in FORWARD else None)
    assert niah["rows"][0]["visual"]["as_images"] == (kind not in WITH_VIDEO)


def check_commands(vqa: Any, niah: Any, videomme: Any, *, reuse: str | None) -> None:
    for done in (vqa, niah, videomme):
        assert done["exit"] == 0, done["stderr"]
    assert [row["frames"] for row in vqa["rows"]] == [4, 4]
    assert {row.get("reuse") for row in vqa["rows"]} == {reuse}
    assert len(niah["rows"]) == 8
    assert {row["visual"].get("reuse") for row in niah["rows"]} == {reuse}
    assert not [row["error"] for row in niah["rows"] if "error" in row]
    assert len(videomme["rows"]) == 3
    assert {row.get("reuse") for row in videomme["rows"]} == {reuse}
    assert all("response" in row and row["frames"] == 2 for row in videomme["rows"])


@pytest.mark.nano
def test_commands_need_no_torchvision_where_the_processor_needs_none(
    llava: Path, clip_questions: Path, nano: Any, folder: Path
) -> None:
    done = generic_parity.commands(llava, nano.clips / "bikes.mp4", clip_questions, folder / "llava-runs")
    check_commands(*list(done)[:3], reuse=None)


@pytest.mark.nano
def test_a_processor_without_its_package_is_one_line(measured: Any, folder: Path) -> None:
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match="orchvision"):
            _ = open_vlm(folder / "internvl").processor  # type: ignore[attr-defined]


def test_what_cannot_be_had_is_one_line(llava: Path, tmp_path: Path) -> None:
    vlm: Any = open_vlm(llava)
    with refused(UsageError, "--hybrid"):
        vlm.resolve(VideoSampling(hybrid_mode="image"))
    with refused(UsageError, "--frame-mode"):
        vlm.resolve(VideoSampling(frame_mode="pad"))
    with refused(InputError, llava.name):
        vlm.token_rule(VideoSampling())
    asked = ("vqa", "x.mp4", "--ask", "What?", "--model")
    plain = shutil.copytree(llava, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with refused(InputError, "plain"):
        _ = open_vlm(plain).processor  # type: ignore[attr-defined]
    config = json.loads((llava / "config.json").read_text())
    unknown = shutil.copytree(llava, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "llava_next_next", "auto_map": {}}))
    fails(2, run(*asked, unknown), "has no class for model type 'llava_next_next', and the code")
    fails(2, run(*asked, unknown), "--endpoint")
    other = shutil.copytree(llava, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(load_config_of("clip") | {"model_type": "clip"}))
    fails(2, run(*asked, other), "does not load clip models")


def load_config_of(kind: str) -> dict[str, Any]:
    from transformers import AutoConfig

    config: dict[str, Any] = AutoConfig.for_model(kind).to_dict()
    return config


@pytest.mark.parametrize("is_special", [True, False])
def test_special_tokens_that_a_user_types_are_text(is_special: bool, llava: Path, tmp_path: Path) -> None:
    """A placeholder need not be marked as special in the tokenizer's file."""
    path = shutil.copytree(llava, tmp_path / "llava")
    stored = json.loads((path / "tokenizer.json").read_text())
    for token in stored["added_tokens"]:
        token["special"] &= is_special or token["content"] != "<image>"
    (path / "tokenizer.json").write_text(json.dumps(stored))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    if not is_special:
        settings = {key: value for key, value in settings.items() if "<image>" not in json.dumps(value)}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    vlm: Any = open_vlm(path)
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.added_tokens_decoder[tokenizer.convert_tokens_to_ids("<image>")].special == is_special
    visual = vlm.visual_input(generic_parity.drawn(2))
    ids, _ = visual.tail(["Is <image> or <|im_end|> a token?"])
    start = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    assert ids[-len(start) :] == start
    assert not {*tokenizer.all_special_ids, *vlm.processor.placeholder_ids} & set(ids[: -len(start)])
    plain, _ = visual.tail(["Is it?"])
    assert tokenizer.decode(plain) == "\nIs it?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("writes_start", [False, True])
def test_prompts_are_stock_ones_where_spaces_belong_to_words(
    scheme: str, writes_start: bool, llava: Path, tmp_path: Path
) -> None:
    """Llama 2's kind of tokenizer: a space before the first word, a start token that it adds by itself."""
    from transformers import AutoProcessor

    path = shutil.copytree(llava, tmp_path / "llava")
    tokenizer = generic_models.metaspace_tokenizer(scheme)
    template = "USER: IMAGE\nASSISTANT:"
    start = "{{ bos_token }}" if writes_start else ""
    parts = "{% for p in messages[0]['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}"
    tokenizer.chat_template = start + template.replace("IMAGE", parts + "{% endif %}{% endfor %}")
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    (path / "config.json").write_text(json.dumps(config))
    vlm: Any = open_vlm(path)
    images = generic_parity.drawn(2)
    visual = vlm.visual_input(images)
    ids = [*visual.ids_N.tolist(), *visual.tail(["the tree is"])[0]]
    stock = AutoProcessor.from_pretrained(path)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "the tree is"}]
    inputs = stock.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    dict(part, image=image) if part["type"] == "image" else part
                    for part, image in zip(content, [*images, None], strict=True)
                ],
            }
        ],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    placeholder = config["image_token_index"]
    assert [placeholder if i >= vlm.vocabulary else i for i in ids] == inputs["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_conversation_goes_on(llava: Path) -> None:
    vlm: Any = open_vlm(llava)
    visual = vlm.visual_input(generic_parity.drawn(1))
    first, _ = visual.tail(["What?"])
    longer, answer = visual.tail(["What?", "A tree.", "Where?"], "There")
    reply = vlm.processor.tokenizer.encode("A tree.")
    assert longer[: len(first) + len(reply)] == first + reply
    assert vlm.processor.tokenizer.decode(answer) == "There"


def test_images_and_frames_are_counted(llava: Path) -> None:
    vlm: Any = open_vlm(llava)
    count = vlm.count(3, 64, 40, VideoSampling())
    visual = vlm.visual_input(generic_parity.drawn(3))
    assert count["actual"] == visual.tokens == 3 * 16
    assert count["last_position"] == len(visual.ids_N) - 1
    assert load_config(llava).get_text_config().vocab_size == visual.ids_N[visual.ids_N >= vlm.vocabulary][0]


def test_clips_have_their_times() -> None:
    from lvctx.vlm.stock_prompt import video_metadata

    frames = [np.zeros((4, 6, 3), np.uint8)] * 3
    found = video_metadata(Clip(frames=frames, times=[10.0, 10.5, 11.0]))
    assert found["fps"] == 2.0
    assert [index / found["fps"] for index in found["frames_indices"]] == [10.0, 10.5, 11.0]
    assert (found["width"], found["height"], found["duration"]) == (6, 4, 1.5)


def test_readme_has_the_table_of_the_registry() -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    assert model_table() in readme


def test_info_tells_how_a_model_is_evaluated(llava: Path) -> None:
    facts = json.loads(run("info", llava, "--json").stdout)["evaluation"]
    assert facts["family"] == "GenericVLM"
    assert facts["reuse"] == "prefixes"
    assert "niah video" in facts["commands"]
    assert facts["frames_are"] == "images, one for each frame"


def test_support_of_a_model_type() -> None:
    assert support_of("llama") is None
    assert support_of("nothing") is None
    for kind in KINDS:
        support = support_of(kind)
        assert support is not None
        assert (support.family, support.reuse) == ("GenericVLM", "prefixes")
    gemma = support_of("gemma3")
    assert gemma is not None
    assert (gemma.family, gemma.reuse) == ("ForwardVLM", "none")
    assert "niah video" in gemma.commands


def test_frames_of_a_haystack_are_held_in_a_file() -> None:
    frames = generic_parity.drawn(5, shapes=((40, 64), (7, 5)))
    held = FrameFile(iter(frames))
    for number in (4, 0, 1, 1):
        assert np.array_equal(held[number], np.asarray(frames[number]))
        assert isinstance(held[number], np.memmap)
