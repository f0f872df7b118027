"""The texts of RULER's tasks over a whole context: common words, frequent words, and documents with a question.

Templates, counts, numbers of generated tokens and scores are those of NVIDIA's scripts (Hsieh et al. 2024, section 3;
github.com/NVIDIA/RULER, `scripts/data/synthetic`, Apache-2.0). Random draws are our own, so a prompt is one that these
scripts could give, not the same one. RULER takes the words to be counted from the package wonderwords; here they are
those of a text, which may be such a list. A text is drawn for a size, its number of words or documents.
"""

import re
from dataclasses import dataclass
from math import ceil, pi
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lvctx.artifacts.bounded import parse_json, read_whole
from lvctx.errors import InputError

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
DOCUMENTS = (
    f"{INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n{INSTRUCTION}\n\n"
    "Question: {question} Answer:"
)
COMMON_WORDS, SHORT = 10, 4096
"""Words to be found; below this length, in tokens, common words are repeated less often."""
LETTERS = 6
"""Letters of a coded word."""
ZETA = pi**2 / 6
"""The sum of k^-2: coded word number k is a share k^-2 / ZETA of the text, rounded down to a whole number of times."""
AS_PUBLISHED = "give SQuAD's or HotpotQA's JSON as published"


@dataclass(frozen=True, kw_only=True)
class RulerPrompt:
    """A prompt and what it asks for."""

    text: str
    """The prompt, up to where the answer begins."""
    question: str
    """The question in it."""
    answers: tuple[str, ...]
    """The references."""
    answer: str
    """A right answer as text."""


class RulerText(Protocol):
    """A kind of text."""

    template: str
    """Text with a place for the words or documents."""
    new_tokens: int
    """Tokens to generate, which count in a length."""
    any_of: bool
    """Whether one of the references is enough (string match part), or the score is the share of them (all)."""
    trials: int | None
    """Largest number of trials; None for any."""

    def sizes(self, length: int, trial: int) -> tuple[int, int]:
        """Smallest and largest size of a trial's text for a length in tokens. Raises InputError if there is none."""

    def prompt(self, length: int, trial: int, size: int) -> RulerPrompt:
        """The prompt of a trial with a text of this size; its answers do not depend on the size."""


class CommonWords:
    """A numbered list with ten words more often than all others, after a list with its answer as an example.

    30 times and 3 times, in the example of 40 words 10 times and 3 times; below 4,096 tokens 6 times and once, in the
    example of 20 words 3 times and once.
    """

    template, new_tokens, any_of = COMMON, 120, False
    trials: int | None = None

    def __init__(self, text: str, seed: int) -> None:
        """The words are those of five or more lower-case letters in `text`. Raises InputError for too few of them."""
        self.words = np.array(sorted(set(re.findall(r"\b[a-z]{5,}\b", text))))
        self.seed = seed
        if len(self.words) < 40:
            raise InputError(f"{len(self.words)} different words of five or more letters", fix="give more --haystack")

    def sizes(self, length: int, trial: int) -> tuple[int, int]:
        """See `RulerText.sizes`."""
        return COMMON_WORDS + 1, len(self.words)

    def prompt(self, length: int, trial: int, size: int) -> RulerPrompt:
        """See `RulerText.prompt`."""
        example_size, *repeats = (20, 3, 1, 6, 1) if length < SHORT else (40, 10, 3, 30, 3)
        example, shown = self._list([self.seed, 4, trial], example_size, *repeats[:2])
        asked, answers = self._list([self.seed, 3, trial], size, *repeats[2:])
        text = f"{COMMON.format(context=example)} {_numbered(shown)}\n{COMMON.format(context=asked)}"
        question = "What are the 10 most common words in the above list?"
        return RulerPrompt(text=text, question=question, answers=tuple(answers), answer=_numbered(answers))

    def _list(self, seed: list[int], size: int, common: int, uncommon: int) -> tuple[str, list[str]]:
        """A numbered list of `size` words, and those that are in it most often."""
        rng = np.random.default_rng(seed)
        chosen = [str(word) for word in self.words[rng.permutation(len(self.words))[:size]]]
        entries = chosen[:COMMON_WORDS] * common + chosen[COMMON_WORDS:] * uncommon
        return _numbered([str(word) for word in rng.permutation(entries)]), chosen[:COMMON_WORDS]


class FrequentWords:
    """Coded words, six random letters each, whose frequencies fall with the square of their rank (zeta distribution).

    The most frequent one is written as dots, and the three after it are asked for. There are a fiftieth as many
    different words as tokens.
    """

    template, new_tokens, any_of = FREQUENT, 50, False
    trials: int | None = None

    def __init__(self, seed: int) -> None:
        """`seed` draws the words and their order."""
        self.seed = seed

    def sizes(self, length: int, trial: int) -> tuple[int, int]:
        """See `RulerText.sizes`: from the smallest size on the fifth word is rarer than the fourth."""
        if length < 50 * 5:
            raise InputError(f"{length} tokens are too few for five coded words", fix="give larger --lengths")
        return ceil(32 * ZETA), 2 * length

    def prompt(self, length: int, trial: int, size: int) -> RulerPrompt:
        """See `RulerText.prompt`."""
        rng = np.random.default_rng([self.seed, 3, trial])
        wanted = length // 50
        drawn = rng.integers(26, size=(2 * wanted, LETTERS)) + ord("a")
        words = list(dict.fromkeys("".join(map(chr, row)) for row in drawn.tolist()))[:wanted]
        answers = tuple(words[1:4])
        counts = (size / ZETA / np.arange(1, wanted + 1) ** 2).astype(int)
        context = " ".join(rng.permutation(np.repeat(np.array(["...", *words[1:]]), counts)).tolist())
        question = "What are the three most frequently appeared words in the above coded text?"
        text = FREQUENT.format(context=context)
        return RulerPrompt(text=text, question=question, answers=answers, answer=", ".join(answers))


@dataclass(frozen=True, kw_only=True)
class DocumentQuestion:
    """A question of SQuAD or HotpotQA."""

    question: str
    answers: tuple[str, ...]
    """Different references."""
    own: tuple[str, ...]
    """The documents that answer it (SQuAD), or the ten that were published with it (HotpotQA)."""
    near: tuple[str, ...] = ()
    """Other documents of the same article, which are taken as distractors first (SQuAD)."""


class QuestionDocuments:
    """Documents in random order: those of a question, and others of the file as distractors.

    Trial i asks the file's question i.
    """

    template, new_tokens, any_of = DOCUMENTS, 32, True

    def __init__(self, path: Path, seed: int) -> None:
        """Read the questions of `path`. Raises InputError for another file than SQuAD's and HotpotQA's."""
        self.questions = read_document_questions(path)
        self.documents = sorted({d for question in self.questions for d in (*question.own, *question.near)})
        self.seed = seed
        self.trials: int | None = len(self.questions)

    def sizes(self, length: int, trial: int) -> tuple[int, int]:
        """See `RulerText.sizes`."""
        return len(self.questions[trial].own), len(self.documents)

    def prompt(self, length: int, trial: int, size: int) -> RulerPrompt:
        """See `RulerText.prompt`."""
        asked = self.questions[trial]
        rng = np.random.default_rng([self.seed, 3, trial])
        near = [asked.near[i] for i in rng.permutation(len(asked.near))]
        used = {*asked.own, *near}
        others = (self.documents[i] for i in rng.permutation(len(self.documents)))
        chosen = [*asked.own, *near, *(document for document in others if document not in used)][:size]
        shuffled = (chosen[i] for i in rng.permutation(len(chosen)))
        context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(shuffled, start=1))
        text = DOCUMENTS.format(context=context, question=asked.question)
        return RulerPrompt(text=text, question=asked.question, answers=asked.answers, answer=asked.answers[0])


def read_document_questions(path: Path) -> list[DocumentQuestion]:
    """The questions of SQuAD's JSON (1.1 or 2.0, where those without an answer are left out) or HotpotQA's.

    Raises InputError for a file of another form.
    """
    value = parse_json(read_whole(path), where=path, fix=AS_PUBLISHED)
    try:
        found = list(_squad(value["data"]) if isinstance(value, dict) else _hotpot(value))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise InputError("neither SQuAD nor HotpotQA", where=path, fix=AS_PUBLISHED) from e
    if not found:
        raise InputError("no question with an answer", where=path, fix=AS_PUBLISHED)
    return found


def _squad(articles: list[Any]) -> list[DocumentQuestion]:
    found = []
    for article in articles:
        contexts = list(dict.fromkeys(_text(paragraph["context"]) for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            own = _text(paragraph["context"])
            near = tuple(context for context in contexts if context != own)
            for row in paragraph["qas"]:
                if not row.get("is_impossible"):
                    answers = tuple(dict.fromkeys(_text(answer["text"]) for answer in row["answers"]))
                    question = _text(row["question"])
                    found.append(DocumentQuestion(question=question, answers=_some(answers), own=(own,), near=near))
    return found


def _hotpot(rows: list[Any]) -> list[DocumentQuestion]:
    found = []
    for row in rows:
        own = dict.fromkeys(f"{_text(title)}\n{''.join(map(_text, sentences))}" for title, sentences in row["context"])
        answers = (_text(row["answer"]),)
        found.append(DocumentQuestion(question=_text(row["question"]), answers=_some(answers), own=tuple(own)))
    return found


def _some(answers: tuple[str, ...]) -> tuple[str, ...]:
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError("no answer")
    return answers


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))
