"""Model cards: the hub's metadata as its own library reads it, what was trained and how, and results; no path."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support import aligning, report_runs
from test_longva import lvctx

from lvctx.artifacts.manifest import MANIFEST, listed_files, read_manifest
from lvctx.artifacts.result_log import RESULTS
from lvctx.artifacts.store import fingerprint, sha256_file
from lvctx.cli.options import card_command
from lvctx.data.hub import hub_datasets
from lvctx.eval.benchmarks.accuracy import accuracy, to_reply
from lvctx.models.card import CARD
from lvctx.training.mrope_config import MropeConfig

BASE_CARD = """---
license: apache-2.0
language:
- en
model-index:
- name: Tiny
  results:
  - task: {type: text-generation}
    dataset: {type: x, name: X}
    metrics: [{type: accuracy, value: 99}]
---
# Tiny

It is the best model.
"""


def card_of(directory: Path) -> Any:
    """The card as the hub's library reads it; it writes the same text."""
    card = ModelCard.load(directory / CARD)
    assert str(card) == (directory / CARD).read_text()
    return card


def snapshot(model: Path, cache: Path, name: str, card: str) -> Path:
    """A model as the hub's library stores what it downloads."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "blobs")
    (repository / "blobs" / CARD).write_text(card)
    out = repository / "snapshots" / "0123abcd"
    out.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (out / path.name).symlink_to(Path("../../blobs") / path.name)
    return out


def extend(base: Path, data: Path, out: Path) -> Path:
    options = "--rope yarn --factor 4 --steps 2 --batch-tokens 128 --lora 2 --seed 3 -q"
    assert lvctx("extend-lm", "--model", base, "--data", data, *options.split(), "-o", out)[0] == 0
    return out


@pytest.fixture(scope="module")
def packed(nano: Any, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "rows"
    options = ("--seq-len", 64, "--keep-short", 1, "--tokens", 1024, "--workers", 1)
    essay = nano.essays / "love.txt"
    code, _, said = lvctx(
        "pack-text", essay, "--tokenizer", tiny_lm, "--separator", "<|endoftext|>", *options, "-o", out
    )
    assert code == 0, said
    assert read_manifest(out)["datasets"] == []
    manifest = read_manifest(out) | {"datasets": ["org/books", "no id at all"]}
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def base(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot(tiny_lm, tmp_path_factory.mktemp("hub"), "org/tiny-lm", BASE_CARD)


@pytest.fixture(scope="module")
def extended(base: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extend(base, packed, tmp_path_factory.mktemp("extended") / "lm")


def test_an_extended_model_has_the_hubs_metadata_and_what_was_trained(extended: Path) -> None:
    card = card_of(extended)
    assert card.data.to_dict() == {
        "base_model": "org/tiny-lm",
        "base_model_relation": "finetune",
        "datasets": ["org/books"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["lvctx", "long-context"],
    }
    # 2 steps of 2 rows with 63 next tokens each; 4 x 512 positions.
    for row in ("steps | 2", "tokens in the loss | 252", "context | 2,048", "rope | yarn", "seq len | 64"):
        assert f"| {row} |" in card.text
    assert "## Positions\n\nYaRN by 4" in card.text
    assert "best model" not in card.text
    manifest = read_manifest(extended)
    assert manifest["files"][CARD]["sha256"] == sha256_file(extended / CARD)
    assert manifest["tokens"] == 252


def test_its_command_is_the_one_that_made_it(extended: Path, base: Path, packed: Path) -> None:
    """With paths in place of the names in capitals it finds its own output finished."""
    (command,) = re.findall(r"```sh\n(.*)\n```", (extended / CARD).read_text())
    paths = {"MODEL": base, "DATA": packed, "OUT": extended}
    before = sha256_file(extended / MANIFEST)
    code, (row,), said = lvctx(*(paths.get(word, word) for word in shlex.split(command)[1:]), "--resume", "must")
    assert code == 0, said
    assert (row["sha256"], sha256_file(extended / MANIFEST)) == (before, before)


def test_the_same_inputs_give_the_same_card_anywhere(extended: Path, base: Path, packed: Path, tmp_path: Path) -> None:
    moved = snapshot(base, tmp_path / "other", "org/tiny-lm", BASE_CARD)
    again = extend(moved, shutil.copytree(packed, tmp_path / "data"), tmp_path / "again")
    assert (again / CARD).read_bytes() == (extended / CARD).read_bytes()
    assert str(tmp_path.parent.parent) not in (again / CARD).read_text()


def test_an_aligned_model_names_both_bases_and_every_step(extended: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """A tower that states no licence leaves the whole without one; a later step keeps the earlier ones."""
    aligning.draw(tmp_path)
    data = aligning.write(tmp_path / "data.json", [aligning.talk("<image>What?", "red", image="1.png")])
    tower = snapshot(tiny_tower, tmp_path / "hub", "org/tower", "---\nlanguage: de\n---\n")
    common = ("--data", data, "--images", tmp_path, "--steps", 1, "--batch", 1, "-q")
    assert lvctx("align", "--lm", extended, "--tower", tower, *common, "-o", tmp_path / "a")[0] == 0
    again = ("--rope-theta", 3e5, "--steps", 0, "-q", "-o", tmp_path / "b")
    assert lvctx("extend-lm", "--model", tmp_path / "a", *again)[0] == 0
    card = card_of(tmp_path / "b")
    assert card.data.base_model == ["org/tiny-lm", "org/tower"]
    assert (card.data.license, card.data.language, card.data.datasets) == (None, ["en", "de"], ["org/books"])
    assert card.data.pipeline_tag == "video-text-to-text"
    assert re.findall("^##+ (.*)", card.text, re.MULTILINE) == [
        *("Base models", "Provenance", "extend-lm", "align", "extend-lm", "Positions", "Images and video"),
    ]
    for text in (card.text, card_of(tmp_path / "a").text):
        assert text.count("| [org/tiny-lm](https://huggingface.co/org/tiny-lm) | apache-2.0 |\n") == 1
        assert text.count("| [org/tower](https://huggingface.co/org/tower) | not stated |\n") == 1


HOSTILE = "| `x` <script>alert(1)</script>\n\n# Heading\n[a](javascript:b) ![c](d) *e* ~~f~~ $g$"


@pytest.mark.parametrize(
    "metadata",
    [
        f"license: {json.dumps(HOSTILE)}\nlanguage: [1, 2]\nbase_model: {{a: b}}",
        f"license: other\nlicense_name: {json.dumps(HOSTILE)}\nlicense_link: LICENSE\ntags: [x]",
        "license: [\x00",
        "- a list",
        "a: &a [*a, *a]\nmodel-index: 3\ntags: 7",
    ],
)
def test_text_of_a_foreign_card_is_shown_as_it_is(tiny_lm: Path, tmp_path: Path, metadata: str) -> None:
    """No part of it becomes markup, and metadata that cannot be read are left out."""
    base = snapshot(tiny_lm, tmp_path, "org/tiny-lm", f"---\n{metadata}\n---\ntext\n")
    assert lvctx("extend-lm", "--model", base, "--steps", 0, "-q", "-o", tmp_path / "out")[0] == 0
    card = card_of(tmp_path / "out")
    tokens = [t for block in MarkdownIt().enable("table").parse(card.text) for t in (block, *(block.children or []))]
    assert not [t for t in tokens if t.type in ("html_inline", "html_block", "image", "em_open", "s_open")]
    assert [t.attrs["href"] for t in tokens if t.type == "link_open"] == ["https://huggingface.co/org/tiny-lm"]
    cells = [t.content for t in tokens if t.type == "inline" and "alert" in t.content]
    shown = "".join(t.content for t in tokens if t.type == "text")
    if "script" in metadata:
        assert len(cells) == 1
        assert " ".join(HOSTILE.split()) in shown
    assert card.data.get("license_link") in (None, "https://huggingface.co/org/tiny-lm/blob/main/LICENSE")


def test_a_path_is_never_in_a_command_and_a_hub_id_stays(tmp_path: Path) -> None:
    config = MropeConfig(
        model="Qwen/Qwen2-VL-7B-Instruct",
        out=Path("runs/out"),
        scale=4.0,
        data=tmp_path / "rows",
        stages=(f"seq-len=64,data={tmp_path / 'first'},steps=2",),
    )
    assert card_command("mrope-extend", config) == (
        "lvctx mrope-extend --model Qwen/Qwen2-VL-7B-Instruct -o OUT --scale 4.0 --data DATA "
        "--stage seq-len=64,data=DATA,steps=2"
    )


def test_datasets_of_the_hub_are_the_inputs_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    assert hub_datasets(["-", "org/b@v1", tmp_path, str(tmp_path / "x.jsonl"), Path("org/a")]) == ["org/a", "org/b"]


# --- results


def test_results_are_in_the_metadata_and_in_a_table(extended: Path, tmp_path: Path) -> None:
    """The mean of 150 needles by hand; the exported card is the model's own and changes nothing in it."""
    before = (extended / CARD).read_bytes()
    identity = {"model": fingerprint(extended)[:16], "haystack": "0", "scoring": "forced"}
    fields = {"schema": "lvctx.niah/1", "modality": "text", "chance": 0.1, "trained_length": 64, "longest_sample": 0}
    cells = [(n, d, t) for n in (512, 2048) for d in (0.0, 1.0) for t in range(5)]
    rows = {
        f"{n}-{d}-{t}": {
            **fields,
            **{"length": n, "depth": d, "trial": t, "position": int(n * d), "tokens": n},
            "correct": n == 512 or t < 3,
        }
        for n, d, t in cells
    }
    needles = report_runs.write_rows(tmp_path / "niah", identity, rows)
    perplexity = {"schema": "lvctx.perplexity/1", "perplexity": 12.5, "rows": 3, "seq_len": 64, "data": "f00"}
    (tmp_path / "ppl.jsonl").write_text(json.dumps(perplexity) + "\n")
    given = ("--results", needles, "--results", tmp_path / "ppl.jsonl")
    first = lvctx("export", extended, "--to", "hf", *given, "-o", tmp_path / "out")
    assert first[0] == 0, first
    card = card_of(tmp_path / "out")
    values = [(r.dataset_type, r.metric_type, r.metric_value) for r in card.data.eval_results]
    assert values == [
        ("niah-text", "accuracy", 80.0),
        ("niah-text", "effective-length", 512),
        ("packed-rows", "perplexity", 12.5),
    ]
    assert card.data.base_model == "org/tiny-lm"
    assert "| 80.0 |" in card.text.partition("## Evaluation")[2]
    assert lvctx("export", extended, "--to", "hf", *given, "-o", tmp_path / "out") == first
    alone = lvctx("export", extended, "--card", *given, "-o", tmp_path / "alone")
    assert alone[0] == 0, alone
    assert [path.name for path in (tmp_path / "alone").iterdir() if path.name[0] != "."] == [CARD]
    assert (tmp_path / "alone" / CARD).read_bytes() == (tmp_path / "out" / CARD).read_bytes()
    assert lvctx("export", extended, "--card", "-o", tmp_path / "out")[0] == 3, "a model's directory"
    for wrong in (("--card", "--to", "hf"), (), ("--card", "--push-to-hub", "a/b")):
        assert lvctx("export", extended, *wrong, "-o", tmp_path / "no")[0] == 2
    assert (extended / CARD).read_bytes() == before
    assert read_manifest(tmp_path / "out")["files"][CARD]["sha256"] == sha256_file(tmp_path / "out" / CARD)


def test_results_of_another_model_or_without_a_score_are_refused(extended: Path, tmp_path: Path) -> None:
    made = report_runs.needle_run(tmp_path / "other", seed=0, reach=1e6)
    (tmp_path / "x.jsonl").write_text('{"schema": "lvctx.perplexity/1", "perplexity": "low"}\n')
    for results in (made, tmp_path / "x.jsonl", extended, tmp_path / "none"):
        code, rows, said = lvctx("export", extended, "--to", "hf", "--results", results, "-o", tmp_path / "out")
        assert (code, rows) == (3, []), said
        assert said.startswith(f"lvctx: {results}"), said
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_model_of_others_keeps_its_card_and_one_without_gets_one(base: Path, tiny_lm: Path, tmp_path: Path) -> None:
    assert lvctx("export", base, "--to", "hf", "-o", tmp_path / "a")[0] == 0
    assert {"config.json", "model.safetensors", CARD} <= listed_files(tmp_path / "a").keys()
    assert (tmp_path / "a" / CARD).read_text() == BASE_CARD
    assert lvctx("export", tiny_lm, "--to", "hf", "-o", tmp_path / "b")[0] == 0
    assert card_of(tmp_path / "b").data.library_name == "transformers"


def test_a_benchmarks_accuracy_is_that_of_its_score(base: Path, tmp_path: Path) -> None:
    """Beside the results that the card of the model has already."""
    made = report_runs.benchmark_run(tmp_path / "videomme", seed=1, skill=0.6, failed=2)
    rows = (made / RESULTS).read_text().replace("77a0c1d2e3f40516", fingerprint(base)[:16])
    (made / RESULTS).write_text(rows)
    assert lvctx("export", base, "--to", "hf", "--results", made, "-o", tmp_path / "out")[0] == 0
    old, new = card_of(tmp_path / "out").data.eval_results
    assert (old.dataset_type, old.metric_value) == ("x", 99)
    answered = [row for row in map(json.loads, rows.splitlines()) if "error" not in row]
    estimate = vars(accuracy(map(to_reply, answered), "official"))
    assert (new.task_type, new.dataset_type) == ("video-text-to-text", "lmms-lab/Video-MME")
    assert new.metric_value == round(100 * estimate["mean"], 2)
    shown = f"rule official, frames 32, 95% {100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
    assert f"accuracy in percent, {shown}, {estimate['counted']} of 2,700 questions" == new.metric_name
