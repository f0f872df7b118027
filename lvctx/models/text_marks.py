"""Marks in a text that find its parts again in what a chat template makes of it."""

from collections.abc import Sequence

SIGN, END = "\ufdd0", "\ufdd1"
"""Around our marks: characters that Unicode keeps out of text ("noncharacters")."""
MARK = f"{SIGN}([a-z])([0-9]+){END}"


def mark(kind: str, number: int) -> str:
    """o, c: a turn's content begins, ends. s, e: an answer's tokens begin, end. v, t: a visual token, one as text."""
    return f"{SIGN}{kind}{number}{END}"


def wrap_in_marks(text: str, i: int) -> str:
    """Marks around a text, inside its outer white space, which templates strip."""
    core = text.strip()
    return text.replace(core, mark("o", i) + core + mark("c", i), 1) if core else text


def until_mark(text: str, begin: int) -> str:
    """What follows, up to the next mark."""
    return text[begin:].partition(SIGN)[0]


def insert_marks(text: str, marks: Sequence[tuple[int, str]]) -> str:
    """The text with marks inserted at these places."""
    pieces, done = [], 0
    for at, inserted in sorted(marks, key=lambda one: one[0]):
        pieces += [text[done:at], inserted]
        done = at
    return "".join([*pieces, text[done:]])
