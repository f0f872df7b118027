"""Progressive extension (rows cut to length, stages of a recipe, kills inside them) and the search for a base."""

import json
import os
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import warm_server

from lvctx.artifacts.manifest import Provenance, write_manifest
from lvctx.data.packed import PackedRows, shard_name, write_token_shard
from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.base_search import bases, best
from lvctx.training.progressive import parse_stage

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    {"seq-len": 32, "rope-theta": 1e5, "steps": 3, "lr": 1e-3, "batch-tokens": 64},
    {"seq-len": 100, "rope-theta": 1e6, "steps": 3, "lr": 1e-3, "batch-tokens": 200},
]


def pack(out: Path, *, rows: int = 7, length: int = 100, shards: int = 2) -> Path:
    """A packed directory of random tokens, with documents of random lengths."""
    rng = np.random.default_rng(0)
    out.mkdir()
    parts = np.array_split(np.arange(rows), shards)
    for number, part in enumerate(parts):
        ids = rng.integers(0, 1000, (len(part), length)).astype(np.int32)
        starts = [np.flatnonzero(rng.random(length) < 0.1).astype(np.int32) for _ in part]
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in starts])]).astype(np.int64)
        write_token_shard(out / shard_name(number), ids, offsets, np.concatenate(starts), {})
    provenance = Provenance(schema="lvctx.packed/1", command="pack-text", config={}, inputs={})
    names = [shard_name(n) for n in range(shards)]
    facts = {"rows": rows, "seq_len": length, "shard_rows": [len(p) for p in parts], "length_bins": [], "sources": {}}
    write_manifest(out, provenance, names, **facts)
    return out


@pytest.mark.parametrize("length", [100, 50, 32, 7])
def test_rows_are_cut_into_pieces_with_their_documents(tmp_path: Path, length: int) -> None:
    packed = pack(tmp_path / "packed")
    whole, cut = PackedRows(packed), PackedRows(packed, seq_len=length)
    pieces = 100 // length
    assert len(cut) == 7 * pieces
    for i in range(len(cut)):
        row, begin = i // pieces, (i % pieces) * length
        assert np.array_equal(cut.row(i), whole.row(row)[begin : begin + length])
        marks = np.isin(np.arange(100), whole.doc_starts(row))[begin : begin + length]
        assert np.array_equal(cut.doc_starts(i), np.flatnonzero(marks))
        assert len(cut.positions(i)) == len(cut.documents(i)) == length
    with pytest.raises(IndexError):
        cut.row(len(cut))


def test_a_length_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows have 100 tokens instead of 101; pack-text --seq-len 101"):
        PackedRows(pack(tmp_path / "packed"), seq_len=101)


def test_a_stage_is_read_or_refused() -> None:
    assert parse_stage("seq-len=32,rope-theta=1e6, data=x/y") == {
        "seq_len": 32,
        "rope_theta": 1e6,
        "data": Path("x/y"),
    }
    with pytest.raises(UsageError, match="no 'length'; give seq-len"):
        parse_stage("length=32")
    with pytest.raises(UsageError, match="'many' is not a valid int"):
        parse_stage("steps=many")


def extend(*args: object) -> subprocess.CompletedProcess[str]:
    command = [warm_server.start(), "extend-lm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def recipe(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("recipe")
    lines = [f'[extend-lm]\nmodel = "{tiny_lm}"\ndata = "{pack(here / "packed")}"\n']
    for stage in STAGES:
        lines.append("[[extend-lm.stages]]\n" + "".join(f"{key} = {value}\n" for key, value in stage.items()))
    file = here / "two.toml"
    file.write_text("".join(lines))
    return file


def written(out: Path) -> dict[str, bytes]:
    """Every byte that two runs should share."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("metrics.jsonl", ".verified.json")]
    return {str(p.relative_to(out)): p.read_bytes() for p in files if "checkpoint" not in str(p)}


def test_two_stages_killed_inside_each_end_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM in the first stage, kill -9 in the second; then the same command again."""
    done = extend("--recipe", recipe, "-o", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["stages"]) == 2
    parts = tmp_path / "parts"
    for folder, how in ((parts / "stage-1", "terminate"), (parts, "kill")):
        child = warm_server.Command("extend-lm", "--recipe", recipe, "-o", parts)
        log = folder / "metrics.jsonl"
        while not log.exists() or not log.read_text().count("\n"):
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.005)
        getattr(child, how)()
        child.communicate()
        assert child.returncode == (75 if how == "terminate" else 128 + 9)
        assert not (folder / "MANIFEST.json").exists()
    done = extend("--recipe", recipe, "-o", parts)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "whole") == written(parts)
    manifest = json.loads((parts / "MANIFEST.json").read_text())
    assert [s["rope_theta"] for s in manifest["config"]["stages"]] == [1e5, 1e6]
    assert manifest["trained_length"] == 512, "the model's own context; rows were shorter"
    first = json.loads((parts / "stage-1" / "config.json").read_text())
    assert first["rope_parameters"]["rope_theta"] == 1e5
    before = (parts / "model.safetensors").stat().st_mtime_ns
    assert extend("--recipe", recipe, "-o", parts).returncode == 0
    assert (parts / "model.safetensors").stat().st_mtime_ns == before, "finished is done at once"


def test_the_second_stage_starts_from_the_first(recipe: Path, tmp_path: Path) -> None:
    """At rate 0 the last stage changes nothing, so its weights are the first stage's."""
    from safetensors.torch import load_file

    stages = [
        ",".join(f"{k}={v}" for k, v in (stage | rate).items())
        for stage, rate in zip(STAGES, ({}, {"lr": 0.0}), strict=True)
    ]
    done = extend("--recipe", recipe, "--stage", stages[0], "--stage", stages[1], "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = (load_file(d / "model.safetensors") for d in (tmp_path / "stage-1", tmp_path))
    assert all(first[name].equal(last[name]) for name in first)


@pytest.mark.parametrize(
    ("stage", "code", "said"),
    [
        ("seq-len=200,steps=1,batch-tokens=200", 3, "rows have 100 tokens instead of 200"),
        ("seq-len=50,steps=1,batch-tokens=1000", 3, "14 rows of 50 tokens do not make a step of 1000"),
        ("seq-len=50,steps=1,batch-tokens=40", 2, "less than one row of 50"),
        ("seq-len=50,context=40,steps=1,batch-tokens=50", 2, "rows of 50 are longer than the 40 positions"),
    ],
)
def test_what_a_stage_cannot_do_is_one_line(recipe: Path, tmp_path: Path, stage: str, code: int, said: str) -> None:
    done = extend("--recipe", recipe, "--stage", "seq-len=50,steps=1,batch-tokens=50", "--stage", stage, "-o", tmp_path)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("lvctx: stage 2: ")
    assert said in done.stderr


def test_rows_read_more_than_once_are_a_warning(recipe: Path, tmp_path: Path) -> None:
    flags = ("--stage", "seq-len=100,steps=8,batch-tokens=100,lr=0")
    done = extend("--recipe", recipe, *flags, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 rows for 8 steps: each row is used 1.1 times" in done.stderr


def test_bases_are_a_grid_by_factor() -> None:
    assert bases("1e5:1e6", 5) == (1e5, 1.78e5, 3.16e5, 5.62e5, 1e6)
    assert bases("3e6:1e9", 2) == (3e6, 1e9)
    for wrong in ("1e5", "1e6:1e5", "a:b", "0:1e5"):
        with pytest.raises(UsageError, match="--search-base"):
            bases(wrong, 3)


def test_the_best_base_finds_most_then_is_surer_then_smaller() -> None:
    def row(base: float, accuracy: float, log_prob: float) -> dict[str, Any]:
        return {"base": base, "accuracy": accuracy, "log_prob": log_prob}

    assert best([row(1e5, 0.0, -1), row(2e5, 0.5, -9), row(3e5, 0.2, -2)]) == 2e5
    assert best([row(1e5, 0.5, -3), row(2e5, 0.5, -2), row(3e5, 0.5, -4)]) == 2e5
    assert best([row(1e5, 0.5, -2), row(2e5, 0.5, -2)]) == 1e5


def test_search_scores_each_base_as_a_model_that_has_it(nano: Any, tiny_lm: Path, tmp_path: Path) -> None:
    """A candidate's row equals niah on a model written with that base; a torn row is redone, the others are not."""
    from lvctx.inference.prefix_scorer import PrefixScorer
    from lvctx.models.loading import load_model

    flags = ["--model", tiny_lm, "--steps", 0, "--haystack", nano.essays, "--search-base", "1e4:1e8"]
    flags += ["--search-points", 3, "--search-lengths", "200,256", "--search-depths", "0,1"]
    done = extend(*flags, "-o", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    log = tmp_path / "found" / "search.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["base"] for row in rows] == [1e4, 1e6, 1e8]
    manifest = json.loads((tmp_path / "found" / "MANIFEST.json").read_text())
    assert [r["log_prob"] for r in manifest["search"]["table"]] == [r["log_prob"] for r in rows]
    chosen = json.loads((tmp_path / "found" / "config.json").read_text())["rope_parameters"]["rope_theta"]
    assert chosen == best(rows)

    plain = extend("--model", tiny_lm, "--steps", 0, "--rope-theta", 1e8, "-o", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    from lvctx.eval.niah.base_search import resolve_search
    from lvctx.training.extend_config import BaseSearchConfig, ExtendConfig

    config = ExtendConfig(model=str(tiny_lm), out=tmp_path / "found", steps=0)
    asked = BaseSearchConfig(
        search_base="1e4:1e8",
        search_points=3,
        search_lengths=(200, 256),
        search_depths=(0.0, 1.0),
        haystack=(nano.essays,),
    )
    search = resolve_search(config, asked, device="cpu")
    scorer = PrefixScorer(load_model(tmp_path / "plain"))
    expected = [round(scorer.score(*search.niah.task.sequence(cell)).log_prob, 4) for cell in search.niah.cells]
    assert [cell["log_prob"] for cell in rows[2]["cells"]] == expected

    whole = log.read_bytes()
    os.truncate(log, len(whole) - 20)
    assert extend(*flags, "-o", tmp_path / "found").returncode == 0
    assert log.read_bytes() == whole


def test_recipes_tables_are_flags() -> None:
    """The published schedules parse into stages that `extend-lm` knows; each length is reached from below."""
    for name, stages in (("easycontext-7b", 7), ("giraffe-7b", 4)):
        table = tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text())["extend-lm"]
        assert len(table["stages"]) == stages
        parsed = [parse_stage(",".join(f"{k}={v}" for k, v in stage.items())) for stage in table["stages"]]
        lengths = [stage["seq_len"] for stage in parsed]
        assert lengths == sorted(lengths)
        bases = [stage["rope_theta"] for stage in parsed if "rope_theta" in stage]
        assert bases == sorted(bases)
        assert bases[0] >= {"easycontext-7b": 1e4, "giraffe-7b": 1e6}[name], "the base of the model it starts from"
        assert all(stage["batch_tokens"] % stage["seq_len"] == 0 for stage in parsed)


def test_curves_go_where_they_are_asked_to(recipe: Path, tmp_path: Path) -> None:
    """What TensorBoard reads back is what metrics.jsonl says; without the extra it is one line and exit 5."""
    flags = ("--recipe", recipe, "--stage", "seq-len=50,steps=2,batch-tokens=50", "--log", "tensorboard")
    done = extend(*flags, "-o", tmp_path / "out")
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        assert done.returncode == 5, done.stderr
        assert "pip install 'lvctx[tensorboard]'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(r["step"], r["loss"]) for r in rows]
