"""Several ranks process one sequence: each has a part of the cache; scores and replies equal those of one process."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from support import mrope_models, warm_server
from support.costs import without_cost
from support.refusals import refused
from test_niah import encode, results, run, text_arguments
from test_prefix import plain_text, small_model, tree_size
from test_ring import tiny_config
from torch.nn import functional as F

from lvctx.errors import InputError
from lvctx.eval.niah.job import NiahJob, plan_text
from lvctx.eval.niah.niah_config import Depths, TextNiahConfig
from lvctx.eval.niah.run import NiahRun, run_niah
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.inference.prefix_scorer import PrefixScorer, Score, walk_order
from lvctx.models.loading import load_model, load_tokenizer
from lvctx.parallel.context import ParallelContext, joined, make_context
from lvctx.parallel.striped_attention import Stripe, _attend, least, owned_count, prepare

WORDS = ["the", "old", "tree", "stood", "by", "a", "river", "and", "people", "came", "from", "far"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int) -> list[str]:
    """Torchrun in a process of its own, whose children are the ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "lvctx"]


def start(checks: Any, *given: Any, ranks: int) -> None:
    """Forked, so that a process costs no import, and as many as are needed."""
    multiprocessing.start_processes(checks, args=(ranks, *given), nprocs=ranks, start_method="fork")


def story() -> str:
    rng = np.random.default_rng(0)
    return " ".join(" ".join(rng.choice(WORDS, 7)).capitalize() + "." for _ in range(80))


@pytest.fixture(scope="module")
def essays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("essays")
    (out / "story.txt").write_text(story(), encoding="utf-8")
    return out


# --- attention


def check_attention(world: ParallelContext) -> None:
    """Appended and cut in every way: torch's own attention over the whole, of which each rank computes its tokens."""
    for dtype, off in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        for chunks in ([5, 1, 1, 1, 7, 8, 3], [16, 2, 13, 4], [64]):
            torch.manual_seed(len(chunks))
            q, k, v = (torch.randn(1, heads, sum(chunks), 8).to(dtype) for heads in (4, 2, 2))
            whole = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
            keys, values, first = k[:, :, :0], v[:, :, :0], 0
            for count in chunks:
                stripe = Stripe(ring=world.ring, first=first, count=count)
                own = range(first, first + count)[stripe.local_slice]
                keys, values = torch.cat([keys, k[:, :, own]], 2), torch.cat([values, v[:, :, own]], 2)
                out, _ = _attend(None, q[:, :, own], keys, values, None, stripe=stripe)
                if stripe.local_count:
                    torch.testing.assert_close(out.float(), whole[:, :, own].transpose(1, 2), atol=off, rtol=off)
                else:
                    keys, values = keys[:, :, :-1], values[:, :, :-1]
                first += count
            assert keys.shape[2] == owned_count(first, world.ring) == len(range(world.ring.rank, first, world.cp))


# --- a grid


def check_grid(world: ParallelContext, kind: str, vocabulary: int, walked: list[tuple[np.ndarray, int, Score]]) -> None:
    scorer = PrefixScorer(small_model(kind, vocabulary), chunk=37, ring=world.ring)
    for ids, answer, stock in walked:
        ours = scorer.score(ids, answer)
        assert (ours.forced, ours.rank) == (stock.forced, stock.rank)
        assert ours.log_prob == pytest.approx(stock.log_prob, rel=1e-5)
        held_here = {layer.get_seq_length() for layer in scorer._prefix.cache.layers}
        assert held_here == {len(range(world.ring.rank, len(ids) - 1, world.cp))}, "1/N of the tokens"
    assert scorer.tokens_run == tree_size([ids for ids, _, _ in walked]), "together they run every edge once"


def check_any_order(world: ParallelContext) -> None:
    """Short sequences, so that some ranks have no token of a forward; words written; every kind of cache."""
    rng = np.random.default_rng(1)
    stock, model = small_model("llama", 40), small_model("llama", 40)
    for placement, off in (("device", 1e-5), ("host", 1e-5), ("int8", 0.05)):
        walker = PrefixScorer(model, chunk=5, kv_cache=placement, ring=world.ring)  # type: ignore[arg-type]
        for _ in range(4):
            ids = rng.integers(0, 3, rng.integers(3, 14))
            plain, ours = plain_text(stock, ids, 2), walker.score(ids, 2, generate=3)
            assert ours.log_prob == pytest.approx(plain.log_prob, rel=off)
            if placement != "int8":
                assert (ours.forced, ours.rank) == (plain.forced, plain.rank)
                assert ours.generated == PrefixScorer(copy.deepcopy(stock)).score(ids, 2, generate=3).generated
    ids = rng.integers(0, 40, 19)
    together, alone = PrefixScorer(model, chunk=4, ring=world.ring), PrefixScorer(copy.deepcopy(stock))
    assert together.decode([together.prefill(ids, 6, set())])[0] == alone.decode([alone.prefill(ids, 6, set())])[0]
    assert (
        together.decode([together.prefill(ids[:11], 6, set())])[0]
        == alone.decode([alone.prefill(ids[:11], 6, set())])[0]
    )


def read(job: NiahJob, out: Path, world: ParallelContext) -> None:
    for _ in run_niah(job, out, NiahRun(parallel=world, prefill_chunk=50)):
        pass


def reading_checks(rank: int, ranks: int, store: Path, grids: dict[str, Any], vocabulary: int, job: NiahJob) -> None:
    torch.set_num_threads(1)
    with joined(store / "store", rank=rank, size=ranks):
        for cp in (2, 4):
            world = make_context(device="cpu", cp=cp)
            assert least(100 - world.ring.rank, world.ring, torch.device("cpu")) == 101 - cp
            check_attention(world)
            check_any_order(world)
            for kind, walked in grids.items():
                check_grid(world, kind, vocabulary, walked)
        read(job, store / "together", make_context(device="cpu", cp=2))


def same_rows(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Rows of the same cells with the same verdicts, no cell twice; log-probabilities are stored to four decimals."""
    assert len({row["key"] for row in some}) == len(some)
    one, two = ({row["key"]: row for row in without_cost(rows)} for rows in (some, others))
    assert one.keys() == two.keys()
    for key, row in one.items():
        assert row["log_prob"] == pytest.approx(two[key]["log_prob"], abs=2e-4)
        assert {**row, "log_prob": 0} == {**two[key], "log_prob": 0}


def printed(stdout: str) -> list[dict[str, Any]]:
    """Printed rows, without what they cost."""
    return without_cost(json.loads(line) for line in stdout.splitlines())


def test_two_and_four_ranks_read_as_one(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    """Four processes as two pairs and as one group: odd lengths, grouped queries, a whole grid, one results file."""
    tokenizer = load_tokenizer(tiny_lm)
    test = TextNeedleTask(tokenizer, story(), distractors=0, seed=3)
    cells = test.cells([131, 180, 247], [0, 0.5, 1], 2)
    sequences = [test.sequence(cell) for cell in cells]
    grids = {}
    for kind in ("llama", "qwen2"):
        model = small_model(kind, len(tokenizer))
        order = walk_order(ids for ids, _ in sequences)
        grids[kind] = [(*sequences[i], plain_text(model, *sequences[i])) for i in order]
    config = TextNiahConfig(
        model=str(tiny_lm),
        haystack=(essays,),
        lengths=(131, 200),
        depths=Depths(values=(0.0, 0.5, 1.0)),
        trials=2,
        scoring="both",
    )
    job = plan_text(config)
    read(job, tmp_path / "alone", ParallelContext(device="cpu"))
    start(reading_checks, tmp_path, grids, len(tokenizer), job, ranks=4)
    same_rows(results(tmp_path / "together"), results(tmp_path / "alone"))
    assert (tmp_path / "together" / "heatmap.png").is_file()
    assert job.costs(4)["cache_bytes"] == job.costs()["cache_bytes"] / 4 == 200 / 4 * 2 * 2 * 2 * 16 * 4


# --- from the command line


def test_a_run_that_cannot_be_divided_is_refused(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    arguments = [*text_arguments(tiny_lm, essays, tmp_path / "a"), "--cp", 2]
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert refused.stderr == (
        "lvctx: --cp 2 does not divide the run's 1 process; start it with `torchrun --nproc-per-node 2 -m lvctx ...`\n"
    )
    planned = run(*arguments, "--dry-run")
    assert planned.exit_code == 0, "what a rank will hold can be asked without ranks"
    assert json.loads(planned.stdout)["cp"] == 2
    asked = run("vqa", tmp_path / "x.frames.safetensors", "--model", tiny_lm, "--ask", "What?", "--cp", 2)
    assert (asked.exit_code, "--cp 2 does not divide" in asked.stderr) == (2, True)


def test_a_sliding_window_is_refused(tiny_lm: Path) -> None:
    model = load_model(tiny_lm).model
    model.config = tiny_config("mistral", sliding_window=16)
    with refused(InputError, "mistral"):
        prepare(model)


def test_two_ranks_watch_together(tiny_vlm: Path, tmp_path: Path) -> None:
    """Names come in a pipe, which one rank alone can read."""
    from lvctx.models.vision_encoder import load_tower

    frames = encode(load_tower(tiny_vlm, dtype=None), tmp_path / "a.frames.safetensors")
    flags = ["--model", str(tiny_vlm), "--ask", "What is it?", "--ask", "What color?", "--max-new-tokens", "6"]
    alone = run("vqa", frames, *flags)
    assert alone.exit_code == 0, alone.stderr
    done = subprocess.run(
        [*warm_server.torchrun(2), "vqa", "-", *flags, "--cp", "2"],
        input=f"{frames}\n",
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout) == printed(alone.stdout)


@pytest.mark.nano
def test_two_ranks_process_a_video_with_qwen(nano: Any, tmp_path: Path) -> None:
    """M-RoPE's three axes are shared out as the tokens are."""
    vlm = mrope_models.save("qwen2_5_vl", tmp_path / "vlm")
    flags = [str(nano.clips / "bikes.mp4"), "--model", str(vlm), "--ask", "What is it?", "--ask", "What color?"]
    flags += ["--frames", "5", "--hybrid", "2,24,4", "--max-new-tokens", "6"]
    alone = run("vqa", *flags)
    assert alone.exit_code == 0, alone.stderr
    done = subprocess.run(
        [*warm_server.torchrun(2), "vqa", *flags, "--cp", "2"], capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout) == printed(alone.stdout)


@pytest.mark.nano
def test_two_ranks_answer_a_benchmark(nano: Any, tmp_path: Path) -> None:
    """One log, written by one rank, with the replies of one process alone; what it has is not asked again."""
    vlm = mrope_models.save("qwen2_5_vl", tmp_path / "vlm")
    questions = Path(__file__).parent / "data" / "nextqa.csv"
    flags = ["bench", "nextqa", "run", "--model", str(vlm), "--videos", str(nano.clips), "--questions", str(questions)]
    flags += ["--frames", "4", "--max-new-tokens", "6"]
    alone = run(*flags, "-o", tmp_path / "alone")
    assert alone.exit_code == 0, alone.stderr
    command = [*warm_server.torchrun(2), *flags, "-o", str(tmp_path / "together"), "--cp", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert printed(done.stdout) == printed(alone.stdout)
    assert without_cost(results(tmp_path / "together")) == without_cost(results(tmp_path / "alone"))
    again = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr


@pytest.mark.slow
def test_kill_9_of_one_rank_loses_the_running_cells_alone(tiny_lm: Path, essays: Path, tmp_path: Path) -> None:
    """Four processes as two pairs; torchrun ends the others, and none takes the lost connection for a failed cell."""
    grid = ["--lengths", "130,251,330", "--trials", "5", "--no-reuse", "--prefill-chunk", "16"]
    arguments = [str(a) for a in text_arguments(tiny_lm, essays, tmp_path / "alone")]
    arguments[arguments.index("--lengths") : arguments.index("--scoring")] = grid
    assert run(*arguments).exit_code == 0
    command = [*torchrun(4), *arguments[:-1], str(tmp_path / "killed"), "--cp", "2"]
    log = tmp_path / "killed" / "results.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV) as running:
        while not log.exists() or log.read_bytes().count(b"\n") < 6:
            assert running.poll() is None
            time.sleep(0.01)
        ranks = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        assert len(ranks) == 4
        stood = log.read_bytes()
        os.kill(int(ranks[3]), 9)
        assert running.wait(timeout=120) != 0
    assert log.read_bytes().startswith(stood)
    before = results(tmp_path / "killed")
    assert len(before) < len(results(tmp_path / "alone"))
    assert not any("error" in row for row in before)
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(results(tmp_path / "killed")) - len(before), "only what was missing"
    same_rows(results(tmp_path / "killed"), results(tmp_path / "alone"))
