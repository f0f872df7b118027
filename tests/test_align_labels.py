"""The labels of a conversation: the assistant's text and the end of its turn, in each family's chat template.

Expected sequences are written by hand: `«...»` is counted, `▪` is a visual token, everything else is read only.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from support.refusals import refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lvctx.data.chat_encoding import TokenSequence, encode_conversation
from lvctx.data.conversations import Conversation, Turn
from lvctx.data.row_media import Media
from lvctx.errors import InputError
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import VIDEO_TOKEN

TEMPLATES = Path(__file__).parent / "data" / "chat"
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", VIDEO_TOKEN,
)  # fmt: skip


def tokenizer_of(family: str) -> Any:
    """Bytes, the special tokens of all families, and merges across white space, as real vocabularies have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ġ"), ("r", "e"), ("re", "d")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|begin_of_text|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text().removesuffix("\n")
    return tokenizer


def parts(content: str) -> tuple[str | Media, ...]:
    """A turn's content with its images as parts."""
    split = re.split(f"({VIDEO_TOKEN})", content)
    return tuple(Media("image", "0.png") if piece == VIDEO_TOKEN else piece for piece in split)


def encode(family: str, *turns: tuple[str, str]) -> tuple[TokenSequence, str]:
    """The sequence, an image being three tokens, and how it reads."""
    tokenizer = tokenizer_of(family)
    conversation = Conversation(where="here", turns=tuple(Turn(role, parts(content)) for role, content in turns))
    sequence = encode_conversation(conversation, tokenizer, lambda image: 3)
    for label, following in zip(sequence.labels, [*sequence.ids[1:], None], strict=True):
        assert label in (IGNORED, following), "a label is the next token or nothing"
    counted = [False, *(label != IGNORED for label in sequence.labels[:-1])]
    text = ""
    for i, (token, counts) in enumerate(zip(sequence.ids, counted, strict=True)):
        text += "«" if counts and not counted[i - 1] else "»" if not counts and i and counted[i - 1] else ""
        text += tokenizer.decode([token]).replace(VIDEO_TOKEN, "▪")
    return sequence, text + "»" * counted[-1]


MULTI_TURN = (
    ("user", VIDEO_TOKEN + "What color?"),
    ("assistant", "red"),
    ("user", "And " + VIDEO_TOKEN + "this?"),
    ("assistant", "dark blue"),
)
SYSTEM = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "qwen2",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n▪▪▪What color?<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»\n"
            "<|im_start|>user\nAnd ▪▪▪this?<|im_end|>\n<|im_start|>assistant\n«dark blue<|im_end|>»\n",
        ),
        (
            "smollm2",
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\n▪▪▪What color?<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»\n"
            "<|im_start|>user\nAnd ▪▪▪this?<|im_end|>\n<|im_start|>assistant\n«dark blue<|im_end|>»\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n▪▪▪What color?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«red<|eot_id|>»"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd ▪▪▪this?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«dark blue<|eot_id|>»",
        ),
    ],
)
def test_turns_with_images(family: str, expected: str) -> None:
    sequence, text = encode(family, *MULTI_TURN)
    assert text == expected
    assert [text[:i].count("▪") for i in (text.index("▪"), text.rindex("▪▪▪"))] == [0, 3]
    assert len(sequence.places) == 2


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "qwen2",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n«Ho<|im_end|>»\n",
        ),
        (
            "smollm2",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n«Ho<|im_end|>»\n",
        ),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«Ho<|eot_id|>»",
        ),
    ],
)
def test_text_alone_under_a_system_prompt(family: str, expected: str) -> None:
    assert encode(family, *SYSTEM)[1] == expected


def test_markup_counts_as_in_longvas_code() -> None:
    """The targets of `preprocess_qwen`, by hand: each turn's <|im_start|>, <|im_end|> and newline count."""
    tokenizer = tokenizer_of("qwen2")
    start, end, video = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", VIDEO_TOKEN))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    newline = ids("\n")
    sequence: list[int] = []
    targets: list[int] = []
    system = ("system", "You are a helpful assistant.")
    for role, text in (system, *MULTI_TURN):
        content = [i for n, piece in enumerate(text.split(VIDEO_TOKEN)) for i in ([video] * 3 * (n > 0) + ids(piece))]
        before = ids(role) + newline
        sequence += [start, *before, *content, end, *newline]
        counted = content if role == "assistant" else [IGNORED] * len(content)
        targets += [start, *[IGNORED] * len(before), *counted, end, *newline]
    conversation = Conversation(where="here", turns=tuple(Turn(role, parts(text)) for role, text in MULTI_TURN))
    found = encode_conversation(conversation, tokenizer, lambda image: 3, markup=True)
    assert found.ids == sequence
    assert found.labels == [*targets[1:], IGNORED]


@pytest.mark.parametrize("family", ["qwen2", "smollm2", "llama3"])
@pytest.mark.parametrize("answer", ["red", "\nred", "\n\nred\n", "  red ", "red\n\nor blue", "«ü» 红"])
def test_the_whole_answer_is_counted_whatever_it_begins_with(family: str, answer: str) -> None:
    """White space around an answer could melt into the template's: then its first token would be counted nowhere.

    The ids before the answer are those that a prompt ends with when the model is asked.
    """
    sequence, _ = encode(family, ("user", "What?"), ("assistant", answer))
    tokenizer = tokenizer_of(family)
    end = "<|eot_id|>" if family == "llama3" else "<|im_end|>"
    counted = [label for label in sequence.labels if label != IGNORED]
    assert tokenizer.decode(counted) == answer.strip() + end
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False) + (
        "<|start_header_id|>assistant<|end_header_id|>\n\n" if family == "llama3" else "<|im_start|>assistant\n"
    )
    prompt = tokenizer.encode(asked, add_special_tokens=False)
    assert sequence.ids[: len(prompt)] == prompt
    assert sequence.ids[len(prompt) : len(prompt) + len(counted)] == counted


def test_an_image_in_an_answer_is_never_a_word() -> None:
    text = encode("qwen2", ("user", "Draw."), ("assistant", "Here: " + VIDEO_TOKEN + "There."))[1]
    assert text.endswith("assistant\n«Here: »▪▪▪«There.<|im_end|>»\n")


@pytest.mark.parametrize("family", ["qwen2", "smollm2", "llama3"])
def test_what_follows_the_last_answer_is_left_out(family: str) -> None:
    with_question, without = (
        encode(family, ("user", "Hi"), ("assistant", "Ho"), *more)[0].ids for more in ([("user", "And?")], [])
    )
    assert with_question == without


def test_templates_that_cannot_be_trained_on_are_refused() -> None:
    tokenizer = tokenizer_of("qwen2")
    turns = tuple(Turn(role, (role,)) for role in ("user", "assistant", "user", "assistant"))
    talk = Conversation(where="d.json[3]", turns=turns)
    tokenizer.chat_template = (
        "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    with refused(InputError, "d.json[3]"):
        encode_conversation(talk, tokenizer, lambda image: 3)
