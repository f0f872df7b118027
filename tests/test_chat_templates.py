"""Chat templates of several kinds: trained tokens, prompts, and control tokens in a turn's text.

The templates are written to behave like those of released families. Expected sequences are written by hand: `«...»` is
learned, `▪` is the token of an image, everything else is read only.
"""

import json
import re
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refused
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lvctx.data.chat_encoding import TokenSequence, encode_messages
from lvctx.errors import InputError
from lvctx.models.chat_template import Visual, chat_encoder
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import add_visual_tokens, answer_ids, chat_ids, flatten_content

IMAGE = "<video>"
THINK = "<think>\n\n</think>\n\n"

QWEN25 = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are Qwen.<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set ns.said = m.content %}{% set ns.why = '' %}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{%- set ns.why = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set ns.said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\\n' + ns.why.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- ns.said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
THINKING = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
"""Qwen3's thinking models: the prompt opens the block."""
ALWAYS_SHUT = QWEN3.replace("enable_thinking is defined and not enable_thinking", "true")
"""The prompt for an answer has an empty block, as with `enable_thinking=False`."""
SHUT_IN_PROMPT = QWEN25.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n" + THINK)
"""Only the prompt has one: answers are written without."""
LLAMA3 = """\
{{- bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
PHI3 = """\
{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
GEMMA3 = """\
{{ bos_token }}{% set first = '' %}{% set turns = messages %}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}
{%- endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """\
{%- set ns = namespace(first='', turns=messages) %}
{%- if messages[0].role == 'system' %}
{%- set ns.first = messages[0].content + '\\n\\n' %}{% set ns.turns = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in ns.turns %}
{%- if m.role == 'user' %}{{ '[INST] ' + (ns.first if loop.PLACE else '') + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
SMOLVLM = """\
<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}
{{- ':' if m['content'][0]['type'] == 'image' else ': ' }}
{%- for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
GENERATION = QWEN25.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}",
)
LAST_TWO = QWEN25.replace("for m in messages", "for m in messages[-2:]")
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
NO_MARKERS = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>",
    "[INST]", "[/INST]", "<image>", IMAGE,
)  # fmt: skip


def tokenizer_of(template: str, *, metaspace: bool = False, eos: str = "<|endoftext|>") -> Any:
    """Letters, merges across white space, and special tokens; like byte-level BPE, or like Llama's with a `▁`."""
    if metaspace:
        letters = ["<unk>", "▁", "\n", *map(chr, range(33, 127))]
        merges = [("▁", "r"), ("e", "d"), ("▁r", "ed")]
        vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        model.decoder = decoders.Metaspace(prepend_scheme="never")
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ġ", "Ġ"), ("e", "d"), ("Ġ", "r"), ("Ġr", "ed"), (".", "Ċ")]
        vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
        model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
        # As Llama-3's has it: offsets leave white space out.
        from tokenizers import processors

        model.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|begin_of_text|>", eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, AddedToken("<|end|>", rstrip=True)]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def messages_of(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Turns of user and assistant; `▪` in one is an image."""
    found = [] if system is None else [{"role": "system", "content": system}]
    for i, turn in enumerate(turns):
        pieces = re.split("(▪)", turn)
        content = tuple(Visual(IMAGE) if piece == "▪" else piece for piece in pieces)
        found.append({"role": ("user", "assistant")[i % 2], "content": content})
    return found


def read(tokenizer: Any, sequence: TokenSequence) -> str:
    """The sequence as text, with what is learned between « and »."""
    for label, following in zip(sequence.labels, [*sequence.ids[1:], None], strict=True):
        assert label in (IGNORED, following), "a label is the next token or nothing"
    learned = [False, *(label != IGNORED for label in sequence.labels[:-1])]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    text = ""
    for (counts, is_image), run in groupby(
        zip(learned, sequence.ids, strict=True), lambda one: (one[0], one[1] == image)
    ):
        ids = [token for _, token in run]
        said = "▪" * len(ids) if is_image else tokenizer.decode(ids)
        text += f"«{said}»" if counts else said
    return text


def learn(template: str, *turns: str, system: str | None = None, images: int = 0, **options: Any) -> str:
    tokenizer = tokenizer_of(template, **options)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    messages = messages_of(*turns, system=system)
    return read(tokenizer, encode_messages(messages, tokenizer, [[image]] * images, where="d.json[3]"))


TWO = ("What is red?", "red", "And blue?", "a color.")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(
            QWEN25,
            "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nWhat is red?<|im_end|>\n"
            "<|im_start|>assistant\n"
            "«red<|im_end|>»\n<|im_start|>user\nAnd blue?<|im_end|>\n<|im_start|>assistant\n«a color.<|im_end|>»\n",
            id="Qwen2.5",
        ),
        pytest.param(
            QWEN3,
            "<|im_start|>user\nWhat is red?<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»\n"
            f"<|im_start|>user\nAnd blue?<|im_end|>\n<|im_start|>assistant\n{THINK}«a color.<|im_end|>»\n",
            id="Qwen3",
        ),
        pytest.param(
            LLAMA3,
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is red?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«red<|eot_id|>»"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd blue?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«a color.<|eot_id|>»",
            id="Llama-3",
        ),
        pytest.param(  # <|end|> takes the line's end into itself, as Phi-3's tokenizer does
            PHI3,
            "<|user|>\nWhat is red?<|end|><|assistant|>\n«red<|end|>»<|user|>\nAnd blue?<|end|>"
            "<|assistant|>\n«a color.<|end|>»<|endoftext|>",
            id="Phi-3",
        ),
        pytest.param(
            GEMMA3,
            "<|begin_of_text|><start_of_turn>user\nWhat is red?<end_of_turn>\n"
            "<start_of_turn>model\n«red<end_of_turn>»\n"
            "<start_of_turn>user\nAnd blue?<end_of_turn>\n<start_of_turn>model\n«a color.<end_of_turn>»\n",
            id="Gemma 3",
        ),
        pytest.param(
            MISTRAL.replace("PLACE", "first"),
            "<|begin_of_text|>[INST] What is red?[/INST]« red<|endoftext|>»"
            "[INST] And blue?[/INST]« a color.<|endoftext|>»",
            id="Mistral",
        ),
        pytest.param(
            SMOLVLM,
            "<|im_start|>User: What is red?<end_of_utterance>\nAssistant:« red<end_of_utterance>»\n"
            "User: And blue?<end_of_utterance>\nAssistant:« a color.<end_of_utterance>»\n",
            id="SmolVLM",
        ),
        pytest.param(
            GENERATION,
            "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nWhat is red?<|im_end|>\n"
            "<|im_start|>assistant\n"
            "«red<|im_end|>»\n<|im_start|>user\nAnd blue?<|im_end|>\n<|im_start|>assistant\n«a color.<|im_end|>»\n",
            id="generation marks",
        ),
        pytest.param(
            NO_MARKERS,
            "USER: What is red?\n\nASSISTANT:« red»\n\nUSER: And blue?\n\nASSISTANT:« a color.»\n\n",
            id="no end of turn",
        ),
        pytest.param(  # ".\n" is one token
            NO_MARKERS.replace("\n\n", "\n"),
            "USER: What is red?\nASSISTANT:« red»\nUSER: And blue?\nASSISTANT:« a color.\n»",
            id="the last word melts with the line's end",
        ),
        pytest.param(  # </s> is no token of this tokenizer
            VICUNA,
            "USER: What is red? ASSISTANT:« red</s>»USER: And blue? ASSISTANT:« a color.</s>»",
            id="end of turn in letters",
        ),
    ],
)
def test_two_turns(template: str, expected: str) -> None:
    assert learn(template, *TWO) == expected


def test_mistrals_answer_begins_with_a_token_that_holds_the_space() -> None:
    """Llama's tokenizer writes " red" as one piece; the model has to say it after `[/INST]`."""
    found = learn(MISTRAL.replace("PLACE", "first"), "What?", "red", metaspace=True, eos="<|im_end|>")
    assert found.replace("▁", " ").endswith("[/INST]« red<|im_end|>»")
    tokenizer = tokenizer_of(MISTRAL.replace("PLACE", "first"), metaspace=True, eos="<|im_end|>")
    sequence = encode_messages(messages_of("What?", "red"), tokenizer, [], where="")
    assert [tokenizer.convert_ids_to_tokens(i) for i in sequence.labels if i != IGNORED] == ["▁red", "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            QWEN25,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n«red<|im_end|>»\n",
        ),
        (
            GEMMA3,
            "<|begin_of_text|><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
            "<start_of_turn>model\n«red<end_of_turn>»\n",
        ),
        (MISTRAL.replace("PLACE", "last"), "<|begin_of_text|>[INST] Hi[/INST]« red<|endoftext|>»"),
        (
            MISTRAL.replace("PLACE", "first"),
            "<|begin_of_text|>[INST] Be brief.\n\nHi[/INST]« red<|endoftext|>»",
        ),
        (
            SMOLVLM,
            "<|im_start|>System: Be brief.<end_of_utterance>\nUser: Hi<end_of_utterance>\n"
            "Assistant:« red<end_of_utterance>»\n",
        ),
    ],
)
def test_one_turn_under_a_system_prompt(template: str, expected: str) -> None:
    if "loop.last" in template:  # the last turn is the assistant's, so the system prompt is nowhere
        with pytest.raises(InputError, match="chat template"):
            learn(template, "Hi", "red", system="Be brief.")
        return
    assert learn(template, "Hi", "red", system="Be brief.") == expected


REASONED = "<think>\nIt is a color.\n</think>\n\nred"


def test_reasoning_in_the_last_answer_is_the_models_own_and_dropped_from_earlier_ones() -> None:
    last = learn(QWEN3, "What?", "red", "And?", REASONED)
    assert last.endswith("<|im_start|>assistant\n«<think>\nIt is a color.\n</think>\n\nred<|im_end|>»\n")
    earlier = learn(QWEN3, "What?", REASONED, "And?", "blue")
    assert "assistant\n«red<|im_end|>»\n" in earlier
    assert earlier.count("<think>") == 1


@pytest.mark.parametrize(
    ("template", "turns", "system", "what"),
    [
        (LAST_TWO, TWO, None, "rewrites earlier turns"),
        (MISTRAL.replace("PLACE", "last"), TWO, "Be brief.", "chat template"),
        (SHUT_IN_PROMPT, TWO[:2], None, "rewrites earlier turns"),
        (THINKING, TWO, None, "rewrites earlier turns"),
        (ALWAYS_SHUT, TWO, None, "rewrites earlier turns"),
        (DROPS_SYSTEM, TWO[:2], "Be brief.", "leaves out or repeats a turn of the system"),
        (QWEN25.replace("m.content", "(m.content | replace('red', 'green'))"), TWO[:2], None, "rewrites an answer"),
        (QWEN3, ("What?", "red</think></think>"), None, "rewrites an answer"),
        (QWEN25.replace("m.content", "m.content[:12]"), TWO[:2], None, "chat template"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", TWO[:2], None, "leaves out the user's text"),
        ("{{ messages[0].content.nothing.there }}", TWO[:2], None, "refuses this conversation"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", TWO[:2], None, "refuses this conversation"),
    ],
)
def test_what_a_template_cannot_teach_is_refused(template: str, turns: Any, system: str | None, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        learn(template, *turns, system=system)
    assert "d.json[3]" in str(caught.value) or "leaves out" in what or "refuses" in what


def test_generation_marks_are_stock_transformers_mask() -> None:
    tokenizer = tokenizer_of(GENERATION)
    turns = ["What is red?", "red or ü", "And?", "red"]
    plain = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    stock = tokenizer.apply_chat_template(
        plain, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    chat = chat_encoder(tokenizer).encode(messages_of(*turns))
    assert chat.ids == stock["input_ids"]
    mask = [0] * len(chat.ids)
    for first, _, closed in chat.answers:
        mask[first:closed] = [1] * (closed - first)
    assert mask == stock["assistant_masks"]


def test_generation_marks_around_an_image() -> None:
    found = learn(GENERATION, "▪What is <video>?", "red ▪", "And ▪?", "<image>", images=3)
    assert "user\n▪What is <video>?<|im_end|>" in found
    assert "«red »▪" in found
    tokenizer = tokenizer_of(GENERATION)
    messages = messages_of("▪What?", "red", "And ▪?", "blue")
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    sequence = encode_messages(messages, tokenizer, [[image] * 3, [image] * 2], where="")
    assert [sequence.ids[at : at + n] for at, n in zip(sequence.places, (3, 2), strict=True)] == [
        [image] * 3,
        [image] * 2,
    ]
    assert "".join(re.findall("«.*?»", read(tokenizer, sequence), re.DOTALL)) == "«red<|im_end|>»«blue<|im_end|>»"
    last = encode_messages(messages, tokenizer, [[image], [image]], where="", last_only=True)
    assert tokenizer.decode([i for i in last.labels if i != IGNORED]) == "blue<|im_end|>"


# The prompt


@pytest.mark.parametrize(
    ("template", "after"),
    [
        (QWEN25, "<|im_start|>assistant\n"),
        (QWEN3, "<|im_start|>assistant\n" + THINK),
        (THINKING, "<|im_start|>assistant\n" + THINK),
        (ALWAYS_SHUT, "<|im_start|>assistant\n" + THINK),
        (GENERATION, "<|im_start|>assistant\n"),
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (PHI3, "<|assistant|>\n"),
        (GEMMA3, "<start_of_turn>model\n"),
        (MISTRAL.replace("PLACE", "first"), "[/INST]"),
        (SMOLVLM, "<end_of_utterance>\nAssistant:"),
        (VICUNA, " ASSISTANT:"),
        (QWEN25.split("{%- if add_gen")[0], "<|im_start|>assistant\n"),
    ],
)
@pytest.mark.parametrize("answer", ["red", "a color"])
def test_training_and_needles_condition_on_one_prompt(template: str, after: str, answer: str) -> None:
    """What `niah` forces, what `vqa` asks and what training learns from have the same ids before the answer."""
    tokenizer = tokenizer_of(template)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    sequence = encode_messages(messages_of("▪What?", answer), tokenizer, [[image]], where="")
    first = next(i for i, label in enumerate(sequence.labels) if label != IGNORED) + 1
    before, end, words = answer_ids(tokenizer, "What?", answer)
    assert tokenizer.decode(end).endswith(after)
    assert [*before, image, *end] == sequence.ids[:first]
    assert words == sequence.ids[first : first + len(words)]
    assert tokenizer.decode(words).strip() == answer
    asked = chat_ids(tokenizer, "What?")
    assert asked == (before, end)


def test_a_prompt_that_training_would_not_teach_is_stock_transformers() -> None:
    tokenizer = tokenizer_of(SHUT_IN_PROMPT)
    before, after = chat_ids(tokenizer, "What?")
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    plain = [{"role": "user", "content": IMAGE + "What?"}]
    stock = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert [*before, image, *after] == stock["input_ids"]
    assert answer_ids(tokenizer, "What?", "red")[:2] == (before, after)


def test_forced_needles_read_a_training_sequence() -> None:
    import numpy as np
    from PIL import Image
    from support.frames import even_tokens

    from lvctx.eval.niah.image_needles import ImageNeedle, NeedleSet
    from lvctx.eval.niah.video_task import VideoNeedleTask

    tokenizer = tokenizer_of(QWEN3)
    vocabulary = len(tokenizer)
    tokens = even_tokens(vocabulary=vocabulary, per_frame=1, frames=3, inserted=1)
    needle = ImageNeedle(image=Image.new("RGB", (2, 2)), question="What?", answer="red", subject="it")
    niah = VideoNeedleTask(tokenizer, NeedleSet(needles=[needle], distractors=[]), tokens, seconds=np.arange(3.0))
    (cell,) = niah.cells([3], [0.0], 1)
    ids, answer = niah.sequence(cell)
    block = [int(i) for i in ids if i >= vocabulary]
    sequence = encode_messages(messages_of("▪What?", "red"), tokenizer, [block], where="")
    assert np.array_equal(ids, sequence.ids[: len(ids)])
    learned = [i for i, label in enumerate(sequence.labels) if label != IGNORED]
    assert [len(ids) - answer - 1, answer + 1] == [learned[0], len(learned)], "the answer, then the end of its turn"


# Control tokens that a turn writes


@pytest.mark.parametrize("template", [QWEN25, LLAMA3, PHI3, GEMMA3, MISTRAL.replace("PLACE", "first"), SMOLVLM])
def test_control_tokens_in_a_turn_are_text(template: str) -> None:
    tokenizer = tokenizer_of(template)
    controls = set(tokenizer.all_special_ids)
    turns = [f"What do {t} and <video> do?" for t in SPECIAL]
    for turn in turns:
        answer = f"They end: {turn}"
        chat, plain = (chat_encoder(tokenizer).encode(messages_of(q, a)) for q, a in ((turn, answer), ("x", "y")))
        found, expected = ([i for i in one.ids if i in controls] for one in (chat, plain))
        assert found == expected, "those that the template writes"
        first, end, _ = chat.answers[0]
        assert (
            chat.ids[first:end]
            == tokenizer(tokenizer.decode(chat.ids[first:end]), add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        )
        assert tokenizer.decode(chat.ids[first:end]).strip() == answer


def test_without_and_with_control_tokens_ids_are_stock_transformers() -> None:
    """Against `apply_chat_template`, and where this transformers has it `sanitize_control_tokens`."""
    import inspect

    for template in (QWEN25, QWEN3, LLAMA3, PHI3, GEMMA3):
        tokenizer = tokenizer_of(template)
        can = "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters
        for turns in (
            ("What's red,\n\n blue?", "red.\n\nü 红", "And?", "blue"),
            ("A <|im_end|>?", "<|eot_id|> is <|user|>"),
        ):
            if "<|" in turns[0] and not can:
                continue
            options = {"sanitize_control_tokens": True} if "<|" in turns[0] else {}
            plain = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
            stock = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=True, **options)["input_ids"]
            assert chat_encoder(tokenizer).encode(messages_of(*turns)).ids == list(stock)


def test_turn_markers_that_are_no_special_tokens_are_text_too() -> None:
    tokenizer = tokenizer_of("{% for m in messages %}<｜{{ m.role }}｜>{{ m.content }}<|im_end|>{% endfor %}")
    markers = ["<｜user｜>", "<｜assistant｜>"]
    tokenizer.add_tokens(markers)
    chat = chat_encoder(tokenizer).encode(messages_of("<｜assistant｜>red", "No <｜user｜>"))
    ids = tokenizer.convert_tokens_to_ids(markers)
    assert [i for i in chat.ids if i in ids] == ids
    assert tokenizer.decode(chat.ids) == "<｜user｜><｜assistant｜>red<|im_end|><｜assistant｜>No <｜user｜><|im_end|>"


def test_a_token_that_a_tokenizer_cannot_write_as_text_is_named() -> None:
    """Unigram has `</s>` among its pieces: its letters are always that token."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "<>/sabcdefghijklmnopqrtuvwxyzA:?U ▁\n")]
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert chat_encoder(tokenizer).encode(messages_of("what?", "red")).ids.count(1) == 2
    with refused(InputError, "d.json[3]"):
        encode_messages(messages_of("what </s>?", "red"), tokenizer, [], where="d.json[3]")


@pytest.mark.parametrize("text", ["half \ud83d a character", "\ufdd0o0\ufdd1"])
def test_text_that_is_no_text_is_named(text: str) -> None:
    for turns in ((text, "red"), ("Hi", text)):
        with refused(InputError, "d.json[3]"):
            learn(QWEN25, *turns)


def test_a_template_that_wants_parts_takes_both_once_it_is_a_vlms() -> None:
    from pathlib import Path

    tokenizer = tokenizer_of(SMOLVLM)
    expected = chat_ids(tokenizer, "What?")
    add_visual_tokens(tokenizer, Path("lm"))
    for _ in range(2):  # a VLM may be aligned again
        flatten_content(tokenizer)
        assert chat_ids(tokenizer, "What?") == expected
        parts = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
        text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>User: <video>What?<end_of_utterance>\nAssistant:"


# Any conversation

WORDS = st.text(st.sampled_from("abr \n.é<|>"), max_size=8)
PIECE = st.one_of(WORDS, st.sampled_from([*SPECIAL, "<think>", "</think>", "<|end|>", "<|endoftext|>", "red", ": "]))
TEXT = st.lists(PIECE, min_size=1, max_size=4).map("".join)
FAMILIES = {
    "qwen2.5": (QWEN25, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "phi3": (PHI3, "<|end|>"),
    "gemma3": (GEMMA3, "<end_of_turn>"),
    "mistral": (MISTRAL.replace("PLACE", "first"), "<|endoftext|>"),
    "mistral, system last": (MISTRAL.replace("PLACE", "last"), "<|endoftext|>"),
    "smolvlm": (SMOLVLM, "<end_of_utterance>"),
    "generation": (GENERATION, "<|im_end|>"),
    "vicuna": (VICUNA, "</s>"),
    "thinking": (THINKING, "<|im_end|>"),
    "last two": (LAST_TWO, "<|im_end|>"),
}
TOKENIZERS = {name: tokenizer_of(template) for name, (template, _) in FAMILIES.items()}


@pytest.mark.parametrize("name", list(FAMILIES))
@settings(deadline=None, max_examples=60)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3),
    system=st.one_of(st.none(), TEXT),
    tail=st.booleans(),
)
def test_learned_are_the_answers_and_their_ends_or_the_row_is_refused(
    name: str, turns: list[tuple[str, str]], system: str | None, tail: bool
) -> None:
    """Every user's word is `U...`, so that none can be among what is learned."""
    end, tokenizer = FAMILIES[name][1], TOKENIZERS[name]
    flat = [text for user, answer in turns for text in (f"U{user}U", answer)]
    messages = [*messages_of(*flat, system=system and f"U{system}U"), *([{"role": "user", "content": "U"}] * tail)]
    refused = ""
    try:
        sequence = encode_messages(messages, tokenizer, [], where="here")
    except InputError as e:
        refused = str(e)
    if refused:
        assert refused.startswith("here: the chat template")
        return
    parts = re.findall(r"«(.*?)»", read(tokenizer, sequence), re.DOTALL)
    assert len(parts) == len(turns)
    for part, (_, answer) in zip(parts, turns, strict=True):
        said = answer.strip()
        assert part.endswith(end) or name == "phi3"
        words = part[: part.rindex(end)] if name == "phi3" else part.removesuffix(end)
        assert "U" not in part
        if name in ("qwen3", "thinking") and "</think>" in answer:
            assert "".join(said.split()).endswith("".join(words.split()))
        else:
            assert words.strip() == said
    controls = set(tokenizer.all_special_ids)
    plain = messages_of(*["x"] * len(flat), system=system and "x")
    expected = encode_messages(plain, tokenizer, [], where="here")
    assert [i for i in sequence.ids if i in controls] == [i for i in expected.ids if i in controls]
    assert json.dumps(sequence.labels)
