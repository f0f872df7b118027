"""Walking the tree of prefixes gives what plain stock forwards give, and runs every edge of the tree once."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.frames import even_tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lvctx.errors import InputError
from lvctx.eval.niah.image_needles import drawn_needles
from lvctx.eval.niah.text_task import TextNeedleTask
from lvctx.eval.niah.video_task import VideoNeedleTask
from lvctx.inference.prefix_scorer import PrefixScorer, Score, common_prefix, walk_order
from lvctx.models.loading import load_model, load_tokenizer
from lvctx.models.vlm_assembly import assemble, embed_frames, frame_features, newline_embedding, tokens_per_frame
from lvctx.parallel import striped_attention
from lvctx.parallel.block_attention import Plain
from lvctx.vlm.base import sequential_positions

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def small_model(kind: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    # Weights ten times the usual: a model that has opinions, so that ranks and verdicts differ between sequences.
    return model(config(vocab_size=vocabulary, initializer_range=0.2, **SMALL)).eval()


def plain(logits_LV: torch.Tensor, ids: np.ndarray, answer: int) -> Score:
    """The score read off a stock forward's logits of the whole sequence."""
    logits_AV = logits_LV[-answer - 1 : -1].double()
    wanted = torch.from_numpy(ids[-answer:])
    picked = logits_AV[torch.arange(answer), wanted]
    return Score(
        forced=logits_AV.argmax(1).tolist() == wanted.tolist(),
        log_prob=float(logits_AV.log_softmax(1)[torch.arange(answer), wanted].sum()),
        rank=max(int((row > p).sum()) for row, p in zip(logits_AV, picked, strict=True)),
        predicted=logits_AV.argmax(1).tolist(),
        generated=None,
    )


@torch.no_grad()
def plain_text(model: Any, ids: np.ndarray, answer: int) -> Score:
    out = model(input_ids=torch.from_numpy(ids)[None], use_cache=False, logits_to_keep=answer + 1)
    return plain(out.logits[0], ids, answer)


def assert_same(ours: Score, stock: Score) -> None:
    assert (ours.forced, ours.rank, ours.predicted) == (stock.forced, stock.rank, stock.predicted)
    assert ours.log_prob == pytest.approx(stock.log_prob, abs=1e-4)


def tree_size(sequences: list[np.ndarray]) -> int:
    """Edges of the tree of prefixes, from sorted neighbours; the last token of a sequence is never read."""
    whole = sorted(tuple(s[:-1].tolist()) for s in sequences)
    shared = [common_prefix(np.array(a), np.array(b)) for a, b in itertools.pairwise(whole)]
    return sum(map(len, whole)) - sum(shared)


@pytest.fixture(scope="module")
def story() -> str:
    rng = np.random.default_rng(0)
    words = ["the", "old", "tree", "stood", "by", "a", "river", "and", "people", "came", "from", "far"]
    return " ".join(" ".join(rng.choice(words, 7)).capitalize() + "." for _ in range(80))


@pytest.mark.parametrize("distractors", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_grid_equals_stock(kind: str, distractors: int, tiny_lm: Path, story: str) -> None:
    tokenizer = load_tokenizer(tiny_lm)
    model = small_model(kind, len(tokenizer))
    test = TextNeedleTask(tokenizer, story, distractors=distractors, seed=3)
    cells = test.cells([180, 240, 331], [0, 0.5, 1], 2)
    walker = PrefixScorer(copy.deepcopy(model), chunk=50)
    alone = PrefixScorer(copy.deepcopy(model), chunk=1000, reuse=False)
    sequences = [test.sequence(cell)[0] for cell in cells]
    for cell in [cells[i] for i in walk_order(sequences)]:
        ids, answer = test.sequence(cell)
        assert len(ids) == cell.length
        stock = plain_text(model, ids, answer)
        assert_same(walker.score(ids, answer), stock)
        assert_same(alone.score(ids, answer), stock)
    assert walker.tokens_run == tree_size(sequences)
    assert alone.tokens_run == sum(len(s) - 1 for s in sequences)
    assert walker.tokens_run < 0.7 * alone.tokens_run


def test_video_grid_equals_the_stock_video_path(tiny_lm: Path, tiny_tower: Path) -> None:
    """Pixels of frames and needle and `<video>` tokens go into stock LlavaOnevision; ids and a table into ours."""
    tokenizer = load_tokenizer(tiny_lm)
    vlm = assemble(
        load_model(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower).eval(), tokenizer, where=tiny_lm, seed=0
    )
    torch.manual_seed(0)
    hay_F3SS, needles_N3SS = torch.randn(12, 3, 48, 48), torch.randn(2, 3, 48, 48)
    needles = drawn_needles(2, size=48, seed=0)
    per_frame = tokens_per_frame(vlm.config)
    vocabulary = vlm.get_input_embeddings().weight.shape[0]
    tokens = even_tokens(vocabulary=vocabulary, per_frame=per_frame, frames=12, inserted=2)
    test = VideoNeedleTask(tokenizer, needles, tokens, seconds=np.arange(12.0))
    with torch.no_grad():
        hay, seen = (embed_frames(vlm, frame_features(vlm, pixels)) for pixels in (hay_F3SS, needles_N3SS))
        table = torch.cat([hay, seen, newline_embedding(vlm)])
    walker = PrefixScorer(copy.deepcopy(vlm), table, chunk=30)
    cells = test.cells([4, 9, 12], [0, 0.5, 1], 2)
    sequences = [test.sequence(cell)[0] for cell in cells]
    for cell in [cells[i] for i in walk_order(sequences)]:
        ids, answer = test.sequence(cell)
        frames = torch.cat(
            [
                hay_F3SS[: cell.position],
                needles_N3SS[cell.trial : cell.trial + 1],
                hay_F3SS[cell.position : cell.length],
            ]
        )
        stock_ids = torch.from_numpy(np.where(ids >= vocabulary, vlm.config.video_token_id, ids))[None]
        with torch.no_grad():
            logits = vlm(input_ids=stock_ids, pixel_values_videos=frames[None], use_cache=False).logits[0]
        assert_same(walker.score(ids, answer), plain(logits, ids, answer))
    assert walker.tokens_run == tree_size(sequences)


@pytest.fixture(scope="module")
def opinionated() -> Any:
    return small_model("llama", 40)


@settings(deadline=None, max_examples=25)
@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=20), min_size=1, max_size=6),
    answer=st.integers(1, 3),
    chunk=st.integers(1, 9),
    generate=st.integers(0, 3),
)
def test_any_sequences_in_any_order(
    opinionated: Any, sequences: list[list[int]], answer: int, chunk: int, generate: int
) -> None:
    """The order decides the work, never the result: cropping back leaves nothing stale."""
    walker = PrefixScorer(copy.deepcopy(opinionated), chunk=chunk)
    for sequence in sequences:
        ids = np.array(sequence)
        assert_same(walker.score(ids, answer, generate=generate), plain_text(opinionated, ids, answer))


def test_forced_is_greedy(opinionated: Any) -> None:
    """Greedy decoding begins with the answer exactly when every forced first choice matches; both are stock's."""
    rng = np.random.default_rng(0)
    walker = PrefixScorer(copy.deepcopy(opinionated), chunk=7)
    verdicts = []
    for _ in range(20):
        prompt = rng.integers(0, 40, 15)
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        ids = torch.from_numpy(prompt)[None]
        stock = opinionated.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 15:].tolist()
        for answer in (stock[:3], [*stock[:2], (stock[2] + 1) % 40], [(stock[0] + 1) % 40, *stock[1:3]]):
            score = walker.score(np.array([*prompt, *answer]), 3, generate=4)
            assert score.generated == stock
            assert score.forced == (score.generated[:3] == answer) == (score.rank == 0)
            verdicts.append(score.forced)
    assert set(verdicts) == {True, False}


def test_a_failed_forward_leaves_nothing_behind(opinionated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    walker = PrefixScorer(copy.deepcopy(opinionated), chunk=4)
    ids = np.arange(20)
    walker.score(ids, 2)
    layer = walker.lm.layers[1]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", fail)  # the first layer's cache has grown by then, the second's has not
        with pytest.raises(RuntimeError, match="out of memory"):
            walker.score(np.array([*range(10), *range(10)]), 2)
    assert_same(walker.score(ids, 2), plain_text(opinionated, ids, 2))


def test_a_generated_token_needs_no_pass_over_the_prompt_and_one_kernel_call_a_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions of all tokens are computed once for a reply, and a new token attends to all keys at once."""
    passes, calls = list[int](), list[int]()

    def positions(ids_L: np.ndarray, first: int) -> torch.Tensor:
        passes.append(first)
        return sequential_positions(ids_L, first)

    class Counting:
        forward = staticmethod(lambda *args, **options: calls.append(1) or Plain().forward(*args, **options))  # type: ignore[func-returns-value]

    stock = small_model("llama", 100)
    ids = np.arange(40) % 90
    expected = stock.generate(torch.from_numpy(ids)[None], max_new_tokens=9, do_sample=False, eos_token_id=None)
    monkeypatch.setattr(striped_attention, "choose_kernel", lambda *of: Counting())
    scorer = PrefixScorer(small_model("llama", 100), positions=positions, chunk=16)
    assert scorer.decode([scorer.prefill(ids, 9, ())])[0] == expected[0, 40:].tolist()
    assert len(passes) == 3 + 1
    assert len(calls) == 2 * (1 + 2 + 2 + 8)


def test_a_model_with_another_state_than_keys_and_values_is_refused() -> None:
    """Qwen3.5's linear attention: a cache that was cut back would give wrong scores."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 16, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    config = AutoConfig.for_model("qwen3_5_text", linear_key_head_dim=8, linear_value_head_dim=8, **sizes, **heads)
    with pytest.raises(InputError) as refused:
        PrefixScorer(AutoModelForCausalLM.from_config(config))
    assert "linear_attention" in refused.value.what


@pytest.mark.parametrize(
    ("kind", "changed"), [("cohere", {"logit_scale": 0.5}), ("granite", {"logits_scaling": 8.0}), ("gemma2", {})]
)
def test_a_model_that_changes_its_heads_logits_is_refused(kind: str, changed: dict[str, Any]) -> None:
    """Only its head is used here, so log-probabilities would not be the model's."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    config = AutoConfig.for_model(kind, num_attention_heads=2, num_key_value_heads=1, **sizes, **changed)
    with pytest.raises(InputError):
        PrefixScorer(AutoModelForCausalLM.from_config(config))
