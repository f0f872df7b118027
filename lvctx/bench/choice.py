"""Multiple choice: a reply, the letter that each published scorer reads in it, and signs of a broken run. No torch.

Three rules give one file three numbers, because they differ on replies that are not a bare letter:

- `official`: Video-MME's own script. Stock phrases are cut out, then the first capital letter of an option anywhere in
  the reply is the answer; a reply without one leaves the denominator.
- `lmms-eval`: lmms-eval 0.7, `extract_mcq_answer`. Candidates by how they are written (alone at the start or end, after
  "the answer is", in brackets, ...); the most telling form wins, the last of its kind. No letter: wrong.
- `strict`: the reply begins with the letter, alone or closed by punctuation. Anything else is wrong.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

RULES = ("official", "lmms-eval", "strict")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question as its benchmark releases it."""

    id: str
    """Unique within the benchmark."""
    video: str
    """File name below the folder of videos, or its stem: what questions share. A name for the set of `images`."""
    images: tuple[str, ...] = ()
    """Paths below the folder of images, in the order they are shown, for benchmarks on sets of images."""
    question: str
    """Without its options."""
    options: tuple[str, ...] = ()
    """As they are shown, with their letters; empty for a free answer."""
    answer: str
    """Letter of the right option; the released answer for a free one."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """What accuracy is broken down by: duration, domain, task_type, ..."""
    max_new_tokens: int | None = None
    """Longest reply, where the task wants another than the run's."""
    released: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The released row."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said to one question."""

    id: str
    """The question's."""
    video: str
    """Which video it is about: replies about one video are correlated."""
    answer: str
    """Letter of the right option."""
    response: str
    """What the model said; empty where it said nothing."""
    letters: str = "ABCD"
    """Letters of the options."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """As in `Sample`."""


def lettered(options: Sequence[str]) -> tuple[str, ...]:
    """`A. first`, `B. second`, ..."""
    return tuple(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))


def letter(reply: Reply, rule: str) -> str:
    """The letter that a rule reads in a reply; empty where it finds none."""
    return _read(rule, reply.response, reply.letters)


@cache  # a run repeats few replies, and every table asks again
def _read(rule: str, response: str, letters: str) -> str:
    return _READERS[rule](response, letters)


def verdict(reply: Reply, rule: str) -> bool | None:
    """Right or wrong under a rule; None where the rule does not count the reply."""
    found = letter(reply, rule)
    if not found and rule == "official":
        return None
    return found == reply.answer


OFFICIAL_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    # Two commas are missing in the script, so these are two long phrases that nobody writes; and since the B of
    # "Best answer: C" is therefore not cut out, that reply is read as B. Kept: it is what published numbers rest on.
    "The best option isThe correct option is",
    "Best answer:Best option:",
)


def first_letter(text: str, letters: str, phrases: Sequence[str] = OFFICIAL_PHRASES) -> str:
    """The first of `letters` in a reply once `phrases` are cut out, one after the other; empty where there is none."""
    text = text.strip()
    for phrase in phrases:
        text = text.replace(phrase, "")
    found = re.search(f"[{letters}]", text)
    return found[0] if found else ""


_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
LMMS_PHRASES = (
    *(f"{article}{noun} is" for noun in _NOUNS for article in ("", "the ")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
"""Each is looked for once, where it first stands; so a longer phrase may find what a shorter one inside it does not."""


def _lmms_eval(text: str, letters: str) -> str:
    if not text.strip():
        return ""
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    bare, lower = text.strip(), text.lower()
    found: list[tuple[int, int, str]] = []
    for one in letters:
        written = {6: f"({one})", 5: f"{one}.", 4: f"{one}:", 3: f"{one})", 2: f"{one} "}
        found += [(rank, text.rfind(form), one) for rank, form in written.items() if form in text]
        for phrase in LMMS_PHRASES:
            at = lower.find(phrase)
            if at != -1 and (after := text.find(one, at + len(phrase))) != -1:
                found.append((7, after, one))
        if bare.startswith(one) and not bare[1:2].isalpha():
            found.append((10, 0, one))
        if bare.endswith(one) and not bare[-2:-1].isalpha():
            found.append((9, len(text) - 1, one))
    if not found:
        found = [(0, text.rfind(one), one) for one in letters if one in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else ""


def _strict(text: str, letters: str) -> str:
    found = re.match(rf"\(?([{letters}])(?=[.):,\n]|$)", text.strip())
    return found[1] if found else ""


_READERS = {"official": first_letter, "lmms-eval": _lmms_eval, "strict": _strict}


def signs_of_trouble(replies: Sequence[Reply]) -> list[str]:
    """What a reader has to know before any number: replies that are empty, repeat themselves, or are all alike."""
    total = len(replies)
    if not total:
        return ["no reply at all"]
    empty = sum(not r.response.strip() for r in replies)
    stuck = sum(is_stuck(r.response) for r in replies)
    said = [
        f"{count:,} of {total:,} replies {what}"
        for count, what in ((empty, "are empty"), (stuck, "repeat one token"))
        if count
    ]
    picked = Counter(letter(r, "official") for r in replies)
    del picked[""]
    if picked and total >= 8:
        one, count = picked.most_common(1)[0]
        right = sum(r.answer == one for r in replies) / total
        if count >= 0.9 * picked.total():
            said.append(
                f"{count:,} of {picked.total():,} letters are {one}, the answer to {right:.0%} of the questions"
            )
    return said


def is_stuck(text: str) -> bool:
    """Whether a reply is one short piece over and over, as in `the the the the` or `!!!!!!!!`."""
    return bool(re.fullmatch(r"\s*(\S{1,20}?)(?:\s*\1){3,}\s*", text))
