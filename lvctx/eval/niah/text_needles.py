"""The text needle: a city's magic number in a haystack of real documents (LongVA section 4.4, after Kamradt 2023).

The sequence is `PREFIX`, haystack, needle, haystack, `QUESTION`, answer, and its length in tokens is exactly the
requested one. The answer begins at the first token with a digit: the tokenizer decides whether the space before the
number belongs to the question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lvctx.artifacts.bounded import read_utf8
from lvctx.errors import InputError

PREFIX = "This is a very long story book: <book>"
NEEDLE = "\nThe special magic {city} number is: {number}.\n"
ONE_OF = "\nOne of the special magic {city} numbers is: {number}.\n"
ASSIGN = "\nVAR {name} = {value}.\n"
QUESTION = "</book>.\n Based on the content of the book, Question: {question} Answer: {start}"
Task = Literal["single", "multi-key", "multi-value", "multi-query", "variable-tracking"]
LISTS: tuple[Task, ...] = ("multi-value", "multi-query", "variable-tracking")
"""Tasks whose answer is a list, in any order: teacher forcing has one order, so these are scored by generation."""
CITIES = (
    "Chicago",
    "Yangon",
    "Antananarivo",
    "Colombo",
    "Almaty",
    "Sydney",
    "Seattle",
    "Milan",
    "Jakarta",
    "Bengaluru",
    "Tallinn",
    "Nairobi",
    "Lisbon",
    "Valencia",
    "Casablanca",
    "Montevideo",
    "Kathmandu",
    "Helsinki",
    "Quito",
    "Osaka",
    "Dakar",
    "Havana",
    "Lagos",
    "Prague",
    "Riga",
    "Sofia",
    "Tunis",
    "Vienna",
    "Warsaw",
    "Zagreb",
)
"""Names for needles and distractors."""
LONGVA_CITIES = ("New York", "London", "Paris", "Tokyo", "Beijing", "Berlin")
"""The distractors of LongVA's script, whose needle is always Singapore's number."""


@dataclass(frozen=True, kw_only=True)
class TextNeedle:
    """The sentences inserted in a trial, and the question about them.

    The kinds are RULER's (Hsieh et al. 2024, section 3): one number of several keys, all numbers of one key, the
    numbers of several keys, and every variable of a chain of assignments. Frame and wording are this file's own, so
    scores are not comparable with RULER's.
    """

    sentences: tuple[str, ...]
    """Sentences; the first is the needle at the cell's depth, the others are at even distances from it."""
    question: str
    """The question."""
    start: str
    """The beginning of the answer, before the values that the model has to know."""
    answers: tuple[str, ...]
    """The values that the model has to know."""
    chain: bool = False
    """Whether the sentences keep their order in the text, because later ones refer to earlier ones."""

    @property
    def answer(self) -> str:
        """The answers as text."""
        return ", ".join(self.answers)


def read_haystack(paths: Sequence[Path]) -> str:
    """Text of files, and of every .txt and .md file of folders in sorted order: the same haystack on every machine.

    Raises InputError for a missing path, a file that is not UTF-8 text, or no text.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
        elif path.is_file():
            files.append(path)
        else:
            raise InputError("no such file or folder", where=path)
    texts = [read_utf8(file) for file in files]
    if not any(text.strip() for text in texts):
        raise InputError("no text in the haystack", where=", ".join(map(str, paths)))
    return "\n\n".join(texts)


def draw_distractors(seed: int, count: int, *, city: str | None = None) -> list[tuple[str, str, float]]:
    """City, seven-digit number and position (0 to 1) of `count` distractors: the same for every cell of a grid.

    So cells share the haystack with them. Their cities differ from those of needles; `city` is that of all needles.
    """
    rng = np.random.default_rng([seed, 0])
    numbers = rng.integers(1_000_000, 10_000_000, size=count)
    return [
        (c, str(n), float(f))
        for c, n, f in zip(_cities(seed, city)[1 if city else 0 :], numbers, rng.random(count), strict=False)
    ]


def draw_text_needle(
    task: Task, seed: int, trial: int, *, distractors: int, count: int, key: str | None = None
) -> TextNeedle:
    """The needle of a trial, for this number of `distractors`; `count` keys, values, queries or hops.

    `key` is the city that is asked about in every trial; None takes another city in each.
    """
    if key is not None:
        city = [key, *_cities(seed, key)[1 + distractors :]][:count]
    else:
        cities = _cities(seed)[distractors:]
        city = [cities[(trial + i) % len(cities)] for i in range(count)]
    rng = np.random.default_rng([seed, 1, trial])
    number = [str(n) for n in rng.integers(1_000_000, 10_000_000, size=1 if task == "single" else count)]
    first_needle = NEEDLE.format(city=city[0], number=number[0])
    if task in ("single", "multi-key"):
        more = (NEEDLE.format(city=c, number=n) for c, n in zip(city[1:], number[1:], strict=False))
        question = f"What is the special magic {city[0]} number?"
        start = f"The special magic {city[0]} number is:"
        return TextNeedle(sentences=(first_needle, *more), question=question, start=start, answers=(number[0],))
    if task == "multi-value":
        sentences = tuple(ONE_OF.format(city=city[0], number=n) for n in number)
        question = f"What are all the special magic {city[0]} numbers?"
        start = f"The special magic {city[0]} numbers are:"
        return TextNeedle(sentences=sentences, question=question, start=start, answers=tuple(number))
    if task == "multi-query":
        sentences = tuple(NEEDLE.format(city=c, number=n) for c, n in zip(city, number, strict=True))
        city_list = f"{', '.join(city[:-1])} and {city[-1]}"
        question = f"What are the special magic numbers of {city_list}?"
        start = f"The special magic numbers of {city_list} are:"
        return TextNeedle(sentences=sentences, question=question, start=start, answers=tuple(number))
    names = ["".join(chr(65 + int(letter)) for letter in rng.integers(26, size=5)) for _ in range(count)]
    first = ASSIGN.format(name=names[0], value=number[0])
    copies = (ASSIGN.format(name=b, value=f"VAR {a}") for a, b in pairwise(names))
    question = f"Which variables have the value {number[0]}, directly or through other variables?"
    start = f"The variables with the value {number[0]} are:"
    return TextNeedle(sentences=(first, *copies), question=question, start=start, answers=tuple(names), chain=True)


def _cities(seed: int, key: str | None = None) -> list[str]:
    """Cities in the order of their use; with a `key` it is the first, and LongVA's distractors follow."""
    drawn = [CITIES[i] for i in np.random.default_rng([seed, 2]).permutation(len(CITIES))]
    return drawn if key is None else list(dict.fromkeys([key, *LONGVA_CITIES, *drawn]))


def question_and_answer(tokenizer: Any, needle: TextNeedle) -> tuple[list[int], list[int]]:
    """Token ids of the question, with the space if it is a separate token, and of the answer."""
    text = f"{QUESTION.format(question=needle.question, start=needle.start)} {needle.answer}"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    answer_start = next(i for i, (_, end) in enumerate(spans) if end > len(text) - len(needle.answer))
    return ids[:answer_start], ids[answer_start:]


def sentence_ends(tokenizer: Any, ids_L: np.ndarray) -> np.ndarray:
    """Positions of a haystack after the end of a sentence, and 0; determined by the tokens' text, not their ids."""
    unique, inverse = np.unique(ids_L, return_inverse=True)
    texts = [text.rstrip(" \n\t\"')]") for text in tokenizer.batch_decode([[int(i)] for i in unique])]
    ends = np.array([text.endswith((".", "!", "?", "。", "！", "？")) for text in texts])
    return np.concatenate([[0], np.flatnonzero(ends[inverse]) + 1])
