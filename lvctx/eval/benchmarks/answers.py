"""Multiple choice: replies, the letters that published scorers extract, and warnings of broken runs. No torch.

Four rules are implemented; they differ on replies that are not a bare letter:

- `official`: the current version of Video-MME's own script. Stock phrases are removed, then the first capital letter of
  an option anywhere in the reply is the answer; a reply without one is excluded from the denominator.
- `official-2024`: the script before it removed "Answer:", "Option:", "The correct answer" and "The correct option".
  Numbers published until then were computed with it.
- `lmms-eval`: lmms-eval 0.7.3, `extract_mcq_answer` on the reply without its reasoning. Candidates are ranked by their
  form (alone at the start or end, after "the answer is", in brackets, ...); the last of the best form is the answer.
  A reply without a letter is wrong.
- `strict`: the reply begins with the letter, alone or followed by punctuation. Anything else is wrong.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

RULES = ("official", "official-2024", "lmms-eval", "strict")
RULE_SOURCES = {
    "official": "Video-MME's current eval_your_results.py: also removes Answer:, Option:, The correct answer/option",
    "official-2024": "Video-MME's eval_your_results.py before it removed these four phrases",
    "lmms-eval": "lmms-eval 0.7.3, extract_mcq_answer after removing <think> and <analysis> blocks",
    "strict": "the reply begins with the letter",
}
"""Source and version of each of `RULES`."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question in the form released by its benchmark."""

    id: str
    """Unique within the benchmark."""
    video: str
    """File name (or stem) below the folder of videos, or a name for the set of `images`; questions may share it."""
    images: tuple[str, ...] = ()
    """Paths below the folder of images, in the order of the prompt, for benchmarks on sets of images."""
    question: str
    """Text without the options."""
    options: tuple[str, ...] = ()
    """Options as in the prompt, with their letters; empty for a free answer."""
    answer: str
    """Letter of the right option; the released answer for a free one."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Groups for the breakdown of accuracy: duration, domain, task_type, ..."""
    max_new_tokens: int | None = None
    """Maximum tokens of the reply, if the task's differs from the run's."""
    released: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The released row."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkReply:
    """A model's reply to a question."""

    id: str
    """The question's."""
    video: str
    """The video of the question: replies about the same video are correlated."""
    answer: str
    """Letter of the right option."""
    response: str
    """The reply; empty if there is none."""
    letters: str = "ABCD"
    """Letters of the options."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Groups as in `Question`."""


def format_options(options: Sequence[str]) -> tuple[str, ...]:
    """`A. first`, `B. second`, ..."""
    return tuple(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))


def extract_letter(reply: BenchmarkReply, rule: str) -> str:
    """The letter that a rule extracts from a reply; empty if there is none."""
    return _read(rule, reply.response, reply.letters)


@cache  # a run has few distinct replies, and every table needs them
def _read(rule: str, response: str, letters: str) -> str:
    return _READERS[rule](response, letters)


def is_correct(reply: BenchmarkReply, rule: str) -> bool | None:
    """Right or wrong under a rule; None if the rule does not count the reply."""
    letter = extract_letter(reply, rule)
    if not letter and rule.startswith("official"):
        return None
    return letter == reply.answer


PHRASES_2024 = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    # Two commas are missing in the script, so these are two long phrases that occur in no reply; therefore the B of
    # "Best answer: C" is not removed, and that reply is read as B. Kept, since published numbers depend on it.
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
PHRASES_WITH_COMMAS = (
    *PHRASES_2024[:4],
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
"""The same where the commas are there: LongVideoBench, TimeScope and Video-MME-v2."""
OFFICIAL_PHRASES = (*PHRASES_2024, "Answer:", "Option:", "The correct answer", "The correct option")


def first_letter(text: str, letters: str, phrases: Sequence[str] = OFFICIAL_PHRASES) -> str:
    """The first of `letters` in a reply after removing `phrases` one after the other; empty if there is none.

    The script's other condition, more than ten words without a letter, returns no letter either.
    """
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    match = re.search(f"[{letters}]", text)
    return match[0] if match else ""


REASONING_TAGS = (("<think>", "</think>"), ("<analysis>", "</analysis>"))
"""lmms-eval's default."""


def strip_reasoning(text: str) -> str:
    """A reply without its reasoning blocks, as lmms-eval passes it to its scorers (`strip_reasoning_tags`).

    If only an end tag is left (the prompt has the start tag), the text after the last one is the reply. A block that is
    never closed is kept: its letters count.
    """
    for start, end in REASONING_TAGS:
        # Only up to the last end tag, so that every matched start has an end and the time is linear.
        closed = text.rfind(end) + len(end) if end in text else 0
        text = re.sub(f"{start}.*?{end}", "", text[:closed], flags=re.DOTALL) + text[closed:]
        if end in text and start not in text:
            text = text.rpartition(end)[2]
    return text.strip()


_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
LMMS_PHRASES = [f"{article}{noun} is" for noun in _NOUNS for article in ("", "the ")]
LMMS_PHRASES += ["my answer is", "my choice is", "i choose", "i select", "i pick"]
LMMS_PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
"""Only the first occurrence of a phrase counts, so a longer phrase may match where a shorter one inside it does not."""


def _lmms_eval(text: str, letters: str) -> str:
    text = strip_reasoning(text)
    if not text:
        return ""
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    bare, lower = text.strip(), text.lower()
    candidates: list[tuple[int, int, str]] = []
    for letter in letters:
        forms = {6: f"({letter})", 5: f"{letter}.", 4: f"{letter}:", 3: f"{letter})", 2: f"{letter} "}
        candidates += [(rank, text.rfind(form), letter) for rank, form in forms.items() if form in text]
        for phrase in LMMS_PHRASES:
            start = lower.find(phrase)
            if start != -1 and (position := text.find(letter, start + len(phrase))) != -1:
                candidates.append((7, position, letter))
        if bare.startswith(letter) and not bare[1:2].isalpha():
            candidates.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            candidates.append((9, len(text) - 1, letter))
    if not candidates:
        candidates = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(candidates, key=lambda candidate: candidate[:2])[2] if candidates else ""


def _strict(text: str, letters: str) -> str:
    match = re.match(rf"\(?([{letters}])(?=[.):,\n]|$)", text.strip())
    return match[1] if match else ""


def _official_2024(text: str, letters: str) -> str:
    return first_letter(text, letters, PHRASES_2024)


_READERS = {"official": first_letter, "official-2024": _official_2024, "lmms-eval": _lmms_eval, "strict": _strict}


def response_warnings(replies: Sequence[BenchmarkReply]) -> list[str]:
    """Warnings about replies that are empty, repeat a token, or are mostly the same letter."""
    total = len(replies)
    if not total:
        return ["there are no replies"]
    empty = sum(not r.response.strip() for r in replies)
    stuck = sum(is_degenerate(r.response) for r in replies)
    reasoned = sum(any(tag in r.response for pair in REASONING_TAGS for tag in pair) for r in replies)
    signs = (
        (empty, "are empty"),
        (stuck, "repeat one token"),
        (reasoned, "have reasoning in tags, which only the rule of lmms-eval removes"),
    )
    warnings = [f"{count:,} of {total:,} replies {what}" for count, what in signs if count]
    picked = Counter(extract_letter(r, "official") for r in replies)
    del picked[""]
    if picked and total >= 8:
        top_letter, count = picked.most_common(1)[0]
        right = sum(r.answer == top_letter for r in replies) / total
        if count >= 0.9 * picked.total():
            warnings.append(
                f"{count:,} of {picked.total():,} letters are {top_letter}, the answer to {right:.0%} of the questions"
            )
    return warnings


def is_degenerate(text: str) -> bool:
    """Whether a reply repeats one short piece, as in `the the the the` or `!!!!!!!!`.

    A piece is 1 to 20 characters without white space, repeated at least four times, possibly with white space between.
    """
    words = text.split()
    solid = "".join(words)
    ends = list(accumulate(map(len, words)))
    return any(
        len(solid) % size == 0
        and len(solid) >= 4 * size
        and solid == solid[:size] * (len(solid) // size)
        and all(end % size == 0 for end in ends)
        for size in range(1, 21)
    )
