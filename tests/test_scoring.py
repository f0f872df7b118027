"""Scoring rules against the scorers' own scripts, restated here; keys and responses of every form; linear time."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.eval.benchmarks import longvideobench, vhs
from lvctx.eval.benchmarks.answers import BenchmarkReply, extract_letter, is_correct, is_degenerate, strip_reasoning
from lvctx.eval.benchmarks.responses import read_responses
from lvctx.eval.benchmarks.subtitles import read_subtitles


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(autouse=True)
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are for terminals; with --json there are JSON lines in any case."""
    monkeypatch.setattr("lvctx.cli.output.stdout_is_terminal", lambda: True)


def reply(text: str, answer: str = "B") -> BenchmarkReply:
    return BenchmarkReply(id="1", video="v", answer=answer, response=text)


# --- the authors' script


def script_letter(reply: str, *, now: bool) -> str:
    """`extract_characters_regex` of Video-MME's eval_your_results.py, from its description."""
    reply = reply.strip()
    prefixes = ["The best answer is", "The correct answer is", "The answer is", "The answer"]
    prefixes += ["The best option is" + "The correct option is", "Best answer:" + "Best option:"]  # two commas missing
    if now:
        prefixes += ["Answer:", "Option:", "The correct answer", "The correct option"]
    for prefix in prefixes:
        reply = reply.replace(prefix, "")
    if len(reply.split()) > 10 and not re.search("[ABCD]", reply):
        return ""
    found = re.search("[ABCD]", reply)
    return found.group() if found else ""


PIECES = [
    *(
        "The best answer is",
        "The correct answer is",
        "The answer is",
        "The answer",
        "The best option is",
        "Best answer:",
    ),
    *(
        "The correct option is",
        "Best option:",
        "Answer:",
        "Option:",
        "The correct answer",
        "The correct option",
        "Answer",
    ),
    *("A", "B", "C", "D", "E", "a", " ", " ", "\n", ". ", ": ", "(", ")", "word ", "because ", "An apple "),
]
replies = st.lists(st.sampled_from(PIECES), max_size=16).map("".join)


@given(replies)
def test_official_is_the_authors_script(text: str) -> None:
    for rule, now in (("official", True), ("official-2024", False)):
        expected = script_letter(text, now=now)
        assert extract_letter(reply(text), rule) == expected
        assert is_correct(reply(text), rule) is (expected == "B" if expected else None)


@pytest.mark.parametrize(
    ("text", "now", "before"),
    [
        ("Answer: C", "C", "A"),  # the A of Answer, until it was cut
        ("Option: B", "B", "B"),
        ("My Answer: D. Because", "D", "A"),
        ("Answer:Answer: Answer: D", "D", "A"),
        ("Best answer: C", "B", "B"),  # a comma is missing
        ("The correct answer: C", "C", "C"),
        ("The answer is not known to me from what the frames of this video show", "", ""),
        ("answer: d", "", ""),
    ],
)
def test_official_by_hand(text: str, now: str, before: str) -> None:
    assert (extract_letter(reply(text), "official"), extract_letter(reply(text), "official-2024")) == (now, before)


def video(number: int, *questions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        **{"video_id": f"{number:03}", "duration": "short", "domain": "Knowledge", "sub_category": "Law"},
        "questions": list(questions),
        **more,
    }


def question(name: str, response: Any, answer: Any = "B", **more: Any) -> dict[str, Any]:
    options = ["A. 1", "B. 2", "C. 3", "D. 4"]
    row = {"question_id": name, "task_type": "OCR Problems", "question": "What?", "options": options, "answer": answer}
    return {**row, "response": response, **more}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def score(file: Path) -> dict[str, Any]:
    done = run("videomme", "score", file, "--json")
    assert done.exit_code == 0, done.output
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
    return row


def test_the_output_names_the_script(tmp_path: Path) -> None:
    """Three of four right now; before, two were read as A, one of them rightly."""
    said = [("Answer: B", "B"), ("Answer: A", "A"), ("Option: C", "B"), ("B", "B"), ("no idea", "B")]
    file = write(tmp_path / "r.json", [video(i, question(str(i), r, a)) for i, (r, a) in enumerate(said)])
    row = score(file)
    assert (row["rules"]["official"]["mean"], row["rules"]["official"]["counted"]) == (0.75, 4)
    assert (row["rules"]["official-2024"]["mean"], row["rules"]["official-2024"]["counted"]) == (0.5, 4)
    assert list(row["rule_sources"]) == list(row["rules"]) == ["official", "official-2024", "lmms-eval", "strict"]
    text = run("videomme", "score", file, "--rule", "official-2024").stdout
    assert "official: Video-MME's current eval_your_results.py" in text
    assert "official-2024: Video-MME's eval_your_results.py before it removed" in text
    assert "official-2024 rule, %" in text


# --- lmms-eval's removal of reasoning


def lmms_strip(text: str) -> str:
    """lmms-eval 0.7.3's `strip_reasoning_tags` with its default tags, from its description: blocks one by one."""
    for start, end in (("<think>", "</think>"), ("<analysis>", "</analysis>")):
        while True:
            before, opened, rest = text.partition(start)
            _, closed, after = rest.partition(end)
            if not (opened and closed):
                break
            text = before + after
        if end in text and start not in text:
            text = text.split(end)[-1]
    return text.strip()


TAGGED = ["<think>", "</think>", "<analysis>", "</analysis>", "<THINK>", "A", "B", "(C)", " ", "\n", "is right. "]


@given(st.lists(st.sampled_from(TAGGED), max_size=14).map("".join))
def test_reasoning_is_removed_as_lmms_eval_does(text: str) -> None:
    stripped = lmms_strip(text)
    assert strip_reasoning(text) == stripped
    if lmms_strip(stripped) == stripped:  # else the second call below would remove more
        assert extract_letter(reply(text), "lmms-eval") == extract_letter(reply(stripped), "lmms-eval")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\n(A) fits.\n</think>\nB is likely", "B"),
        ("The lamp: (C)?</think>\n\nB is right because it moves", "B"),  # the prompt held the opening tag
        ("<think>Option (D). Or (A).</think>Option B , I say", "B"),
        ("<think>A</think> <think>C</think> (B)", "B"),
        ("<analysis>(A)</analysis>B", "B"),
        ("<think>(A)</think>", ""),
        ("<think>(A) and then", "A"),  # never closed: it stays
        ("<THINK>(A)</THINK>", "A"),  # other tags stay
    ],
)
def test_replies_with_reasoning(text: str, expected: str) -> None:
    assert extract_letter(reply(text), "lmms-eval") == expected


def test_reasoning_is_reported_and_longvideobench_guesses_without_it(tmp_path: Path) -> None:
    text = "<think>It is A, or C.</think>no idea"
    row = score(write(tmp_path / "r.json", [video(0, question("1", text)), video(1, question("2", "B"))]))
    assert row["warnings"] == ["1 of 2 replies have reasoning in tags, which only the rule of lmms-eval removes"]
    groups = {"duration_group": "15", "question_category": "S2E", "topic_category": "KH"}
    shared = {"video": "v", "answer": "B", "letters": "ABC", "groups": groups}
    rows = [{"id": "1", "response": "<think>A</think>B", **shared}, {"id": "2", "response": text, **shared}]
    found = longvideobench.score(rows)["guessing"]
    assert found["guessed"] == 1
    assert longvideobench.score(rows[:1])["guessing"]["mean"] == 1


# --- keys and responses


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *(
            ("B", "B"),
            ("b", "B"),
            (" B ", "B"),
            ("(B)", "B"),
            ("B.", "B"),
            ("B. 2", "B"),
            ("(b) 2", "B"),
            ("B) 2", "B"),
        ),
        *((1, None), ("1", None), ("E", None), ("Blue", None), ("A, B", None), ("AB", None), ("A cat", None)),
        *((True, None), (1.5, None), (["B"], None), ({"B": 1}, None), (float("nan"), None), ("?", None)),
    ],
)
def test_keys_are_read_or_reported(key: Any, expected: str | None, tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", [video(0, question("x-1", "B", key)), video(1, question("x-2", "B"))])
    row = score(file)
    if expected:
        assert (row["questions"], row["rules"]["official"]["mean"], row["warnings"]) == (2, 1.0, [])
        assert row["overlooked"] == ({} if key == "B" else {"answers in another form than their letter": 1})
    else:
        assert (row["questions"], row["rules"]["official"]["mean"]) == (1, 1.0)
        kind = "answers that are not among their question's options, left out"
        assert row["overlooked"] == {kind: 1}
        assert row["warnings"] == [f"1 {kind}; the first is x-1: {key!r}"]
        assert run("videomme", "score", file).stdout.startswith("WARNING r: 1 answers that are not among")


@pytest.mark.parametrize("response", [["B"], {"answer": "B"}, 2, True, float("nan")])
def test_a_response_that_is_no_text_is_empty_and_reported(response: Any, tmp_path: Path) -> None:
    row = score(write(tmp_path / "r.json", [video(0, question("x-1", response)), video(1, question("x-2", "B"))]))
    assert (row["rules"]["official"]["mean"], row["rules"]["official"]["counted"]) == (1.0, 1)
    assert (row["rules"]["lmms-eval"]["mean"], row["rules"]["lmms-eval"]["counted"]) == (0.5, 2)
    assert row["warnings"][0].startswith("1 responses that are not text, read as empty; the first is x-1: ")


def test_a_key_may_be_any_of_the_options_that_a_question_has(tmp_path: Path) -> None:
    eight = "\n".join(f"{one}. x" for one in "ABCDEFGH")
    rows = [question("1", "F", "F", options=eight), question("2", "B", "D", options=["a", "b", "c"])]
    read = read_responses(write(tmp_path / "r.json", [video(0, *rows)]))
    assert [(r.answer, r.letters) for r in read.replies] == [("F", "ABCDEFGH")]
    assert read.warnings == ["1 answers that are not among their question's options, left out; the first is 2: 'D'"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_responses_in_any_encoding_and_one_video_a_line(encoding: str, tmp_path: Path) -> None:
    separators = "B \u2028 \u2029 \x85 \x0c , ] é"
    rows = [video(0, question("1", separators)), video(1, question("2", "B"))]
    text = json.dumps(rows, ensure_ascii=False)
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n \n"
    for name, content in (("a.json", text), ("b.json", f"\n{text[:-1]} , ]"), ("c.jsonl", lines)):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert [r.response for r in read_responses(tmp_path / name).replies] == [separators, "B"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "null", "[1]", '[{"questions": 1}]', '[{"questions": [1]}]', "[" * 100_000, '"\\ud800"'),
        *('[{"video_id": "\\ud800", "questions": [{"answer": "A"}]}]', '[{"questions": []}]', "[" + "9" * 5000 + "]"),
    ],
)
def test_files_that_are_no_responses_are_one_line_and_exit_3(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    done = run("videomme", "score", tmp_path / "r.json")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert "r.json" in done.stderr


def test_names_of_others_are_no_markup(tmp_path: Path) -> None:
    named = video(0, question("1", "B", task_type=":smile: [/b]"), domain="[red]x", duration="[/]")
    file = write(tmp_path / "a [x] $\\no$.json", [named])
    done = run("videomme", "score", file, "--plot", tmp_path / "p.png", "--csv", tmp_path / "c.csv")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in ("[red]x", ":smile: [/b]", "[/]", "a [x]"))


def test_scoring_time_does_not_grow_with_the_number_of_groups_squared(tmp_path: Path) -> None:
    rows = [video(i, question(str(i), "B", task_type=f"t{i}"), domain=f"d{i}", duration=str(i)) for i in range(300)]
    file = write(tmp_path / "r.json", rows)
    done = run("videomme", "score", file, "--csv", tmp_path / "c.csv", "--json")
    assert done.exit_code == 0
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + 4 * (300 * 7 + 1)


# --- Visual Haystacks


@pytest.mark.parametrize(
    ("shares", "effective"),
    [
        ({1: 10, 2: 6, 3: 5, 5: 9}, 2),  # a later rise does not count
        ({1: 5, 2: 9}, 0),
        ({1: 6, 2: 6, 100: 6}, 100),
        ({20: 7, 3: 8, 5: 5, 100: 8}, 3),  # by number, not by name
    ],
)
def test_effective_length_is_the_largest_up_to_which_none_falls_under(shares: dict[int, int], effective: int) -> None:
    rows = [
        {"id": f"{n}-{i}", "answer": "yes", "response": "yes" if i < k else "no", "groups": {"images": str(n)}}
        for n, k in shares.items()
        for i in range(10)
    ]
    assert vhs.score(rows)["effective_length"] == effective


def test_replies_with_both_words_are_reported() -> None:
    row = {"id": "1", "answer": "no", "response": "Yes and no.", "groups": {"images": "1"}}
    assert vhs.score([row])["warnings"][-1].startswith("1 replies have both yes and no")


# --- time


def stuck_by_definition(text: str) -> bool:
    return bool(re.fullmatch(r"\s*(\S{1,20}?)(?:\s*\1){3,}\s*", text))


@given(
    st.text("ab \n", max_size=24)
    | st.builds(lambda a, b, n: (a + b) * n, st.text("ab"), st.text(" "), st.integers(0, 6))
)
def test_a_stuck_reply_is_one_piece_over_and_over(text: str) -> None:
    assert is_degenerate(text) == stuck_by_definition(text)


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


LONG = 1_000_000


@pytest.mark.parametrize(
    "piece",
    ["a", "ab", "a ", " ", "\n", "<", "<think>", "</think>", "<think>x</think>", "Answer:", "the answer is ", "A", "("],
)
def test_long_replies_are_scored_in_linear_time(piece: str) -> None:
    """A quadratic pattern takes minutes here."""
    text = piece * (LONG // len(piece)) + "!"
    for rule in ("official", "official-2024", "lmms-eval", "strict"):
        assert seconds(lambda rule=rule: extract_letter(reply(text), rule)) < 10  # type: ignore[misc]
    assert seconds(lambda: is_degenerate(text)) < 10


@pytest.mark.parametrize("piece", ["<", "<a", "{\\", "&#", "&#1", "\n", " ", "1\n", "00:", "-", "\n\n1\n", "<a>"])
def test_long_subtitles_are_read_in_linear_time(piece: str, tmp_path: Path) -> None:
    text = "1\n00:00:01,000 --> 00:00:02,000\n" + piece * (LONG // len(piece))
    (tmp_path / "v.srt").write_text(text)
    assert seconds(lambda: read_subtitles(tmp_path / "v.srt")) < 10


@pytest.mark.parametrize("piece", ['\\"', ",", ", ", '"', " ", '",'])
def test_malformed_responses_are_refused_in_linear_time(piece: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('["' + piece * (LONG // len(piece)))
    assert seconds(lambda: run("videomme", "score", tmp_path / "r.json")) < 10
