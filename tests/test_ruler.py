"""RULER's tasks over a whole text: prompts counted by hand, lengths that fit, and the scores of its scripts."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.fault_server import faults
from support.refusals import refused
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.errors import InputError, UsageError
from lvctx.eval.niah.ruler_task import RulerTask
from lvctx.eval.niah.ruler_texts import CommonWords, FrequentWords, QuestionDocuments, RulerText
from lvctx.models.loading import load_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = " ".join(f"{a}{b}{c}tion" for a in LETTERS for b in "aeiou" for c in "lmnr")
PLACES = [f"Town {i}" for i in range(60)]
DATA = Path(__file__).parent / "data" / "squad.json"
SQUAD = json.loads(DATA.read_text())
"""Three articles of eight paragraphs in SQuAD's form, each with one question that has an answer."""
HOTPOT = [
    {
        "_id": str(i),
        "question": f"Is {place} older than Town 99?",
        "answer": "yes",
        "context": [[f"{place}, {part}", [f"Part {part} of {place}.", " It is old."]] for part in range(3)],
        "supporting_facts": [],
    }
    for i, place in enumerate(PLACES)
]


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return load_tokenizer(tiny_lm)


def prompts(tokenizer: Any, text: RulerText, length: int, trials: int = 2) -> list[tuple[str, str]]:
    """Prompt and answer of each trial as text; every prompt fits with the tokens to be generated, and is not short."""
    task = RulerTask(tokenizer, text, task="x")
    found = []
    for cell in task.cells([length], [0, 1], trials):
        assert (cell.length, cell.depth) == (length, None)
        ids, answer = task.sequence(cell)
        used = len(ids) - answer + task.max_new_tokens(answer)
        assert 0.85 * length < used <= length
        found.append((tokenizer.decode(ids[:-answer], skip_special_tokens=True), cell.answer))
    return found


def most_common(entries: list[str], n: int) -> tuple[set[str], int]:
    """The n most frequent entries, and how much more often they occur than all others."""
    ranked = Counter(entries).most_common(n + 1)
    return {word for word, _ in ranked[:n]}, ranked[n - 1][1] - ranked[n][1]


def numbered(text: str) -> list[str]:
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]+)", text), strict=True)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
    return list(words)


@pytest.mark.parametrize(("length", "counts"), [(1400, ((3, 1), (6, 1))), (5000, ((10, 3), (30, 3)))])
def test_common_words_are_those_that_are_counted_most_often(length: int, counts: Any, tokenizer: Any) -> None:
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
        "that appear most often.\n"
    )
    tail = (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )
    answers = []
    for prompt, answer in prompts(tokenizer, CommonWords(WORDS, 0), length):
        blank, example, asked = prompt.split(head)
        assert blank == ""
        example_list, shown = example.split(tail)
        asked_list, rest = asked.split(tail)
        assert rest == ""
        for listed, answered, (often, seldom) in (
            (example_list, numbered(shown), counts[0]),
            (asked_list, answer.split(", "), counts[1]),
        ):
            words = numbered(listed)
            assert most_common(words, 10) == (set(answered), often - seldom)
            assert set(Counter(words).values()) == {often, seldom}
        answers.append(answer)
    assert len(set(answers)) == 2


def test_frequent_words_are_those_after_the_dots(tokenizer: Any) -> None:
    head = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    tail = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    for prompt, answer in prompts(tokenizer, FrequentWords(0), 1000, 3):
        assert prompt.startswith(head)
        assert prompt.endswith(tail)
        counts = Counter(prompt.removeprefix(head).removesuffix(tail).split(" "))
        ranked = counts.most_common()
        assert [word for word, _ in ranked[:4]] == ["...", *answer.split(", ")]
        # 1, 1/4, 1/9, 1/16, 1/25 of one number, rounded down.
        assert all(abs(n * rank**2 - ranked[0][1]) < rank**2 for rank, (_, n) in enumerate(ranked[:5], start=1))
        assert ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        assert len(counts) <= 1000 // 50


@pytest.mark.parametrize("dataset", ["squad", "hotpot"])
def test_a_question_is_asked_about_its_documents_among_others(dataset: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(SQUAD if dataset == "squad" else HOTPOT))
    instruction = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    orders = set()
    for trial, (prompt, answer) in enumerate(prompts(tokenizer, QuestionDocuments(path, 0), 420, 3)):
        head, context, tail = prompt.split(f"{instruction}\n\n")
        assert (head, context.startswith("The following are given documents.\n\n")) == ("", True)
        documents = re.split(r"(?:^|\n\n)Document \d+:\n", context.split("\n\n", 1)[1].removesuffix("\n\n"))[1:]
        assert len(set(documents)) == len(documents)
        if dataset == "squad":
            place = PLACES[trial]
            assert tail == f"Question: When was {place} of Arland founded? Answer:"
            assert answer == f"{1100 + trial} | in {1100 + trial}"
            assert f"{place} of Arland was founded in {1100 + trial}." in documents
            near = [document for document in documents if "Arland" in document]
            assert len(near) == 8, "an article's other documents come first"
            assert len(documents) > 8
        else:
            own = [f"{PLACES[trial]}, {n}\nPart {n} of {PLACES[trial]}. It is old." for n in range(3)]
            assert tail == f"Question: Is {PLACES[trial]} older than Town 99? Answer:"
            assert answer == "yes"
            assert set(own) < set(documents)
        orders.add(
            documents.index(
                f"{PLACES[trial]} of Arland was founded in {1100 + trial}." if dataset == "squad" else own[0]
            )
        )
    assert orders != {0}, "their order is random"


def test_scores_are_those_of_rulers_scripts(tokenizer: Any, tmp_path: Path) -> None:
    """string_match_all: the mean share of references in a reply; string_match_part: whether there is one."""
    path = tmp_path / "q.json"
    path.write_text(json.dumps(SQUAD))
    tasks: list[tuple[RulerText, int]] = [
        (CommonWords(WORDS, 0), 1400),
        (FrequentWords(0), 400),
        (QuestionDocuments(path, 0), 420),
    ]
    for text, length in tasks:
        task = RulerTask(tokenizer, text, task="x")
        cell = task.cells([length], [0], 1)[0]
        references = re.split(", | \\| ", cell.answer)
        replies = ["", references[0].upper(), f"x{references[-1]}y", ". ".join(reversed(references))]
        for reply in replies:
            inside = [float(reference.lower() in reply.lower()) for reference in references]
            expected = max(inside) if isinstance(text, QuestionDocuments) else sum(inside) / len(inside)
            assert task.score_text(cell, reply) == expected
        assert not task.can_force


def test_texts_that_do_not_fit_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(SQUAD))
    for text, length in (
        (CommonWords(WORDS, 0), 300),
        (CommonWords(" ".join(WORDS.split()[:40]), 0), 3000),
        (FrequentWords(0), 249),
        (QuestionDocuments(path, 0), 60),
        (QuestionDocuments(path, 0), 5000),
    ):
        with pytest.raises(InputError):
            RulerTask(tokenizer, text, task="x").cells([length], [0], 1)
    with pytest.raises(UsageError):
        RulerTask(tokenizer, QuestionDocuments(path, 0), task="x").cells([420], [0], 25)
    with pytest.raises(InputError):
        CommonWords("a few words", 0)
    for broken in ("{}", "[1]", '[{"question": "?", "answer": "", "context": []}]', '{"data": []}', "["):
        path.write_text(broken)
        with refused(InputError, "q.json"):
            QuestionDocuments(path, 0)


def test_the_tasks_run_and_are_reported(tiny_lm: Path, tmp_path: Path) -> None:
    questions, words = tmp_path / "squad.json", tmp_path / "words.txt"
    questions.write_text(json.dumps(SQUAD))
    words.write_text(WORDS)

    def niah(*arguments: object) -> Any:
        flags = ("niah", "text", "--model", tiny_lm, "--trials", 1, *arguments)
        return CliRunner().invoke(app, [str(flag) for flag in flags], catch_exceptions=False)

    done = niah("--task", "qa", "--haystack", questions, "--lengths", "150,250", "-o", tmp_path / "qa")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["length"] for row in rows} == {150, 250}
    assert all(row["depth"] is None and 0 <= row["share"] <= 1 for row in rows)
    summary = json.loads((tmp_path / "qa" / "summary.json").read_text())
    assert (summary["labels"], len(summary["shares"])) == (["all"], 2)
    report = CliRunner().invoke(app, ["report", str(tmp_path / "qa"), "-o", str(tmp_path / "r.html")])
    assert report.exit_code == 0, report.stderr
    for task, flags in (
        ("frequent-words", ("--haystack", words)),
        ("frequent-words", ("--depths", "0")),
        ("common-words", ()),
        ("common-words", ("--haystack", words, "--distractors", 1)),
        ("qa", ("--haystack", questions, "--haystack", questions)),
        ("qa", ("--haystack", questions, "--scoring", "forced")),
        ("qa", ("--haystack", questions, "--count", 2)),
    ):
        refused = niah("--task", task, "--lengths", 400, *flags, "-o", tmp_path / "no")
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), (task, flags, refused.stderr)


@pytest.mark.parametrize("prompt_as", ["completion", "chat"])
def test_a_server_is_asked_and_scored_alike(prompt_as: str, tiny_lm: Path, tmp_path: Path) -> None:
    """A reply with one of two answers; the number of tokens is RULER's, or a chat's where that is larger."""
    grid = ("--haystack", DATA, "--task", "qa", "--lengths", 250, "--trials", 2, "--tokenizer", tiny_lm)
    with faults() as server:
        server.reply = lambda body: {"content": "It was founded in 1101, I think."}
        flags = ("--model", "m", "--endpoint", server.url, "--prompt-as", prompt_as, "--jobs", 1, "-o", tmp_path / "a")
        arguments = [str(part) for part in ("niah", "text", *grid, *flags)]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        bodies = server.requests
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["trial"]: row["correct"] for row in rows} == {0: False, 1: True}
    for body in bodies:
        text = body["prompt"] if prompt_as == "completion" else str(body["messages"][-1]["content"])
        assert re.search(r"Question: When was Town \d of Arland founded\? Answer:", text)
        assert body["max_tokens"] == (32 if prompt_as == "completion" else 64)
