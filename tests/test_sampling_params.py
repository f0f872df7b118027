"""Sampling parameters in process: transformers' own filters decide the same, and reasoning has a limit of its own."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.costs import without_cost
from test_vqa import vqa
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lvctx.errors import UsageError
from lvctx.inference.engine import Reply
from lvctx.inference.reasoning import REASONING_MARKS, ReplyBudget, opens_reasoning, split_reasoning
from lvctx.inference.sampling_params import SamplingParams
from lvctx.inference.token_sampling import TokenSampler, filter_logits
from lvctx.inference.transformers_engine import TransformersEngine
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import open_vlm


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-6])
def test_logits_are_filtered_as_transformers_filters_them(temperature: float, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    stock = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        stock.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        stock.append(TopPLogitsWarper(top_p))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    for _ in range(20):
        logits = 3 * torch.randn(200, generator=generator)
        expected = stock(torch.zeros((1, 1), dtype=torch.long), logits[None].clone())[0]
        torch.testing.assert_close(filter_logits(logits.clone(), params), expected)


def test_tokens_are_drawn_by_their_probabilities_and_greedy_is_the_default() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    sampler = TokenSampler(SamplingParams(temperature=1.0, seed=3))
    counts = Counter(sampler(logits) for _ in range(4000))
    for token, probability in enumerate(logits.softmax(0).tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)
    again = TokenSampler(SamplingParams(temperature=1.0, seed=3))
    assert Counter(again(logits) for _ in range(4000)) == counts
    assert [TokenSampler(SamplingParams())(logits) for _ in range(9)] == [2] * 9
    assert SamplingParams().facts == {"temperature": 0.0, "max_new_tokens": 64}
    with pytest.raises(UsageError, match="leaves no token"):
        SamplingParams(temperature=1.0, top_p=0.0)


@pytest.mark.nano
def test_a_seed_makes_a_reply_that_depends_on_no_other(loud_vlm: Path, nano: Any, tmp_path: Path) -> None:
    ask = (nano.clips / "bikes.mp4", "--model", loud_vlm, "--frames", 2, "--feature-cache", tmp_path)
    drawn = (*ask, "--temperature", 1.5, "--top-k", 50, "--seed")
    both, _ = vqa(*drawn, 1, "--ask", "What?", "--ask", "Why?")
    (alone,), _ = vqa(*drawn, 1, "--ask", "Why?")
    (other,), _ = vqa(*drawn, 2, "--ask", "Why?")
    (greedy,), _ = vqa(*ask, "--ask", "Why?")
    assert without_cost([alone]) == without_cost(both[1:])
    assert len({row["answer"] for row in (alone, other, greedy)}) == 3
    assert alone["sampling_params"] == {
        "temperature": 1.5,
        "max_new_tokens": 5,
        "top_p": 1.0,
        "top_k": 50,
        "seed": 1,
    }
    assert greedy["sampling_params"] == {"temperature": 0.0, "max_new_tokens": 5}


# --- reasoning


@pytest.mark.parametrize(("first", "last"), REASONING_MARKS)
def test_reasoning_is_split_from_the_reply(first: str, last: str) -> None:
    def split(text: str, *, opened: bool = False) -> tuple[str, str, bool]:
        made = split_reasoning(text, opened=opened)
        return made.reasoning, made.text, made.open

    assert split(f"{first}\nIt is A? No.\n{last}\n\nB.") == ("It is A? No.", "B.", False)
    assert split(f" {first}\n\n{last}\n\nB.") == ("", "B.", False)
    assert split(f"{first}It is") == ("It is", "", True)
    assert split(f"It is.{last}B", opened=True) == split(f"It is.{last}B") == ("It is.", "B", False)
    assert split("It is", opened=True) == ("It is", "", True)
    assert split(f"B. {first} is a mark") == ("", f"B. {first} is a mark", False)
    assert split(" B. ") == ("", "B.", False)
    assert opens_reasoning(f"<|im_start|>assistant\n{first}\n")
    assert not opens_reasoning(f"<|im_start|>assistant\n{first}\n\n{last}\n\n")


def generate(text: str, params: SamplingParams, *, opened: bool = False) -> ReplyBudget:
    """Tokens of one letter each, until there are enough."""
    budget = ReplyBudget(lambda ids: "".join(map(chr, ids)), params, opened=opened)
    for letter in text:
        if budget.add(ord(letter)):
            break
    return budget


def test_reasoning_does_not_count_against_the_longest_reply() -> None:
    params = SamplingParams(max_new_tokens=8, max_reasoning_tokens=20)
    for text, opened, expected, spent in (
        ("ABCDEFGHIJ", False, ("", "ABCDEFGH"), True),
        ("AB", False, ("", "AB"), False),
        ("<think>why</think>ABCDEFGHIJ", False, ("why", "ABCDEFGH"), True),
        ("why</think>ABCDEFGHIJ", True, ("why", "ABCDEFGH"), True),
        ("<think>a long thought that never ends", False, ("a long though", ""), True),
        ("a long thought that never ends", True, ("a long thought that", ""), True),
    ):
        budget = generate(text, params, opened=opened)
        assert (budget.split.reasoning, budget.split.text) == expected
        assert budget.is_spent == spent


@pytest.mark.nano
def test_a_template_that_opens_reasoning(loud_vlm: Path, nano: Any, tmp_path: Path) -> None:
    """The model never ends its reasoning: it is in the row, and there is no reply to score."""
    vlm = tmp_path / "vlm"
    shutil.copytree(loud_vlm, vlm)
    template = (vlm / "chat_template.jinja").read_text()
    assert "<|im_start|>assistant\n" in template
    (vlm / "chat_template.jinja").write_text(
        template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    )
    engine = TransformersEngine(open_vlm(vlm), device="cpu")
    engine.show([nano.clips / "bikes.mp4"], VideoSampling(frames=2))
    reply: Reply = engine.reply(["What?"], SamplingParams(max_new_tokens=3, max_reasoning_tokens=12))
    assert (reply.text, reply.tokens, reply.cut) == ("", 12, True)
    assert json.loads(json.dumps(reply.facts))["reasoning"] == reply.reasoning != ""
