"""Invariants of packing for any input: nothing lost, budgets exact, memory that does not grow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refused
from test_pack_text import make_tokenizer

from lvctx.data.documents import Chunk, Place
from lvctx.data.mixture import apportion, check_budgets, largest_total, load_mix
from lvctx.data.row_packing import LengthRule, PackingStats, ShardBuffer, take_all, take_budgets, uniform
from lvctx.data.tokenization import Tokens
from lvctx.errors import InputError

SHARES = st.lists(st.floats(1e-4, 1), min_size=1, max_size=6).map(
    lambda w: {f"s{i}": x / sum(w) for i, x in enumerate(w)}
)


def make_tokens(lengths: list[int], codes: list[int] | None = None, names: tuple[str, ...] = ("s0",)) -> Tokens:
    """Documents of these lengths; token j of document i is 1000 i + j, the separator -1."""
    starts = np.cumsum([0, *(n + 1 for n in lengths)])
    ids = [v for i, n in enumerate(lengths) for v in (-1, *(1000 * i + j for j in range(n)))]
    place = Place(0, 0, 0)
    return Tokens(
        chunk=Chunk(start=place, end=place, where="a"),
        ids=np.array(ids, np.int32),
        starts=starts.astype(np.int64),
        status=np.zeros(len(lengths), np.uint8),
        names=names,
        codes=np.array(codes or [0] * len(lengths), np.int32),
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    seq_len=st.integers(2, 40),
    rows=st.integers(1, 5),
)
def test_shards_hold_the_stream_in_order_and_know_where_documents_begin(
    lengths: list[int], seq_len: int, rows: int
) -> None:
    tokens = make_tokens(lengths)
    buffer, ids, begins = ShardBuffer(rows=rows, seq_len=seq_len), [], []

    def drain() -> None:
        found, offsets, starts = buffer.arrays()
        assert offsets[0] == 0
        assert offsets[-1] == len(starts)
        for row, low, high in zip(found, offsets, offsets[1:], strict=False):
            begins.extend(len(ids) + int(s) for s in starts[low:high])
            ids.extend(row.tolist())
        buffer.clear()

    for i in range(len(lengths)):
        document, at = tokens.ids[tokens.starts[i] : tokens.starts[i + 1]], 0
        while at < len(document):
            at += buffer.put(document[at:], begins=at == 0)
            if buffer.full:
                drain()
    drain()
    assert ids == tokens.ids[: len(tokens.ids) // seq_len * seq_len].tolist()
    assert begins == [s for s in tokens.starts[:-1].tolist() if s < len(ids)]


@settings(deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2)), min_size=1, max_size=40),
    budgets=st.lists(st.integers(0, 500), min_size=3, max_size=3),
    cut=st.integers(0, 40),
)
def test_budgets_are_met_in_order_whatever_the_batches(
    documents: list[tuple[int, int]], budgets: list[int], cut: int
) -> None:
    names = ("s0", "s1", "s2")
    tokens = make_tokens([n for n, _ in documents], [c for _, c in documents], names)
    keep, room = tokens.lengths() > 0, dict(zip(names, budgets, strict=True))
    whole = take_budgets(tokens, keep, 0, room, PackingStats())
    for code, name in enumerate(names):
        available = sum(n + 1 for n, c in documents if c == code and n)
        assert whole[tokens.codes == code].sum() == min(room[name], available)
    # A run that begins again at a later document knows from its stats what is left.
    low, stats = min(cut, len(documents)), PackingStats()
    stats.read(tokens, keep, 0, low)
    stats.pack(tokens, keep, whole, 0, low)
    stats = PackingStats(json.loads(json.dumps(stats.to_dict())))
    assert take_budgets(tokens, keep, low, room, stats)[low:].tolist() == whole[low:].tolist()
    assert take_all(tokens, keep, 0, sum(budgets)).sum() == min(sum(budgets), (tokens.lengths() + 1)[keep].sum())


@settings(deadline=None)
@given(shares=SHARES, total=st.integers(0, 10**12))
def test_apportioned_tokens_sum_to_the_total_and_are_off_by_less_than_one(shares: dict[str, float], total: int) -> None:
    budgets = apportion(total, shares)
    assert sum(budgets.values()) == total
    assert all(abs(budgets[s] - total * share) <= 1 + total * 1e-15 for s, share in shares.items())


@settings(deadline=None)
@given(shares=SHARES, available=st.lists(st.integers(0, 10**9), min_size=6, max_size=6))
def test_the_largest_total_fits_and_a_little_more_does_not(shares: dict[str, float], available: list[int]) -> None:
    have = {f"s{i}": n for i, n in enumerate(available)}
    total, scarce = largest_total(have, shares)
    check_budgets(apportion(total, shares), have, shares)
    if total:
        more = total + int(3 / shares[scarce]) + 3
        with pytest.raises(InputError, match="cannot be met"):
            check_budgets(apportion(more, shares), have, shares)


def test_draws_are_uniform_and_belong_to_seed_and_number() -> None:
    numbers = np.arange(200_000)
    draws = uniform(3, numbers)
    assert draws.tolist() != uniform(4, numbers).tolist()
    assert draws[70_000:].tolist() == uniform(3, numbers[70_000:]).tolist()
    assert np.histogram(draws, 20, (0, 1))[0] == pytest.approx(10_000, abs=500)  # five standard deviations
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(draws, uniform(4, numbers))[0, 1]) < 0.01
    rule = LengthRule(min_long=10, keep_short=0.25, seed=3)
    assert rule.keep(np.full(200_000, 10), 0).mean() == pytest.approx(0.25, abs=0.005)
    assert rule.keep(np.array([11, 0]), 0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("web = -1", "share of 'web' is -1"),
        ("web = 'much'", "share of 'web' is 'much'"),
        ("web = 0", "sum to 0"),
        ("", "no shares"),
        ("web", "not valid TOML"),
    ],
)
def test_an_invalid_mix_is_reported(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(InputError, match=what):
        load_mix(str(tmp_path / "mix.toml"))
    with refused(InputError, "gone.toml"):
        load_mix(str(tmp_path / "gone.toml"))
    (tmp_path / "mix.json").write_text('{"web": 1, "book": 3}')
    assert load_mix(str(tmp_path / "mix.json")) == {"web": 0.25, "book": 0.75}


PEAK = """
import resource, sys
from pathlib import Path
from lvctx.data.pack_text import plan_pack_text, run_pack_text
from lvctx.data.pack_text_config import PackTextConfig
if __name__ == "__main__":
    config = PackTextConfig(inputs=(sys.argv[1],), tokenizer=sys.argv[2], out=Path(sys.argv[3]), mix=sys.argv[4],
                            seq_len=4096, shard_tokens=1 << 18, workers=1)
    run_pack_text(plan_pack_text(config), on_progress=lambda done, total, note: None)
    print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["none", "keep"])
def test_ten_times_the_input_same_peak_of_memory(tmp_path: Path, mix: str) -> None:
    bpe = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "run.py").write_text(PEAK)
    peaks = []
    for size in (6, 60):
        source = tmp_path / f"{size}.jsonl"
        with open(source, "w") as f:
            for i in range(size * 16):
                f.write(json.dumps({"text": f"{i} the long book of rivers " * 2600, "source": "ab"[i % 2]}) + "\n")
        command = [sys.executable, tmp_path / "run.py", source, bpe, tmp_path / f"out-{size}", mix]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append([int(n) for n in done.stdout.split()])
    for small, large in zip(*peaks, strict=True):
        assert large < small * 1.1 + 4096, peaks
