"""The text needle: a city's magic number in a haystack of real documents (LongVA section 4.4, after Kamradt 2023).

The sequence is `PREFIX`, haystack, needle, haystack, `QUESTION`, answer, and its length in tokens is exactly the
requested one. The answer begins at the first token with a digit: whether the space before the number belongs to the
question is the tokenizer's to say.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.errors import InputError

PREFIX = "This is a very long story book: <book>"
NEEDLE = "\nThe special magic {city} number is: {number}.\n"
QUESTION = (
    "</book>.\n Based on the content of the book, Question: What is the special magic {city} number? "
    "Answer: The special magic {city} number is:"
)
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


def read_haystack(paths: Sequence[Path]) -> str:
    """Text of files, and of every .txt and .md file of folders in sorted order: the same haystack anywhere.

    Raises InputError for a missing path, a file that is not UTF-8 text, or nothing to read.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md"))
        elif path.is_file():
            files.append(path)
        else:
            raise InputError("no such file or folder", where=path)
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise InputError(f"not UTF-8 text ({e.reason} at byte {e.start})", where=file) from None
    if not any(text.strip() for text in texts):
        raise InputError("no text in the haystack", where=", ".join(map(str, paths)))
    return "\n\n".join(texts)


def draw_distractors(seed: int, count: int) -> list[tuple[str, str, float]]:
    """City, seven-digit number and place (0 to 1) of `count` look-alikes: the same for every cell of a grid.

    So cells share the haystack that holds them. Their cities are never a needle's.
    """
    rng = np.random.default_rng([seed, 0])
    numbers = rng.integers(1_000_000, 10_000_000, size=count)
    return [(c, str(n), float(f)) for c, n, f in zip(_cities(seed), numbers, rng.random(count), strict=False)]


def draw_needle(seed: int, trial: int, distractors: int) -> tuple[str, str]:
    """City and seven-digit number of a trial, beside so many `distractors`."""
    free = _cities(seed)[distractors:]
    number = np.random.default_rng([seed, 1, trial]).integers(1_000_000, 10_000_000)
    return free[trial % len(free)], str(number)


def _cities(seed: int) -> list[str]:
    return [CITIES[i] for i in np.random.default_rng([seed, 2]).permutation(len(CITIES))]


def question_and_answer(tokenizer: Any, city: str, number: str) -> tuple[list[int], list[int]]:
    """Token ids of the question, with the space if it is a token of its own, and of the answer."""
    text = f"{QUESTION.format(city=city)} {number}"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    at = next(i for i, (_, end) in enumerate(spans) if end > len(text) - len(number))
    return ids[:at], ids[at:]


def sentence_ends(tokenizer: Any, ids_L: np.ndarray) -> np.ndarray:
    """Positions of a haystack where a sentence has just ended, and 0; decided by what the tokens say, not their ids."""
    unique, inverse = np.unique(ids_L, return_inverse=True)
    said = [text.rstrip(" \n\t\"')]") for text in tokenizer.batch_decode([[int(i)] for i in unique])]
    ends = np.array([text.endswith((".", "!", "?", "。", "！", "？")) for text in said])
    return np.concatenate([[0], np.flatnonzero(ends[inverse]) + 1])
