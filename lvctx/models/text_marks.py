"""Marks in a text, to find its parts in the output of a chat template."""

from collections.abc import Sequence

SIGN, END = "\ufdd0", "\ufdd1"
"""Delimiters of our marks: Unicode noncharacters, which do not occur in text."""
MARK = f"{SIGN}([a-z])([0-9]+){END}"


def mark(kind: str, number: int) -> str:
    """o, c: start, end of a turn. s, e: start, end of an answer's tokens. v: a visual token, t: one as text."""
    return f"{SIGN}{kind}{number}{END}"


def wrap_in_marks(text: str, i: int) -> str:
    """Put marks around a text, inside its outer white space, which templates strip."""
    core = text.strip()
    return text.replace(core, mark("o", i) + core + mark("c", i), 1) if core else text


def until_mark(text: str, begin: int) -> str:
    """The text from `begin` up to the next mark."""
    return text[begin:].partition(SIGN)[0]


def insert_marks(text: str, marks: Sequence[tuple[int, str]]) -> str:
    """The text with marks inserted at these positions."""
    pieces, done = [], 0
    for at, inserted in sorted(marks, key=lambda one: one[0]):
        pieces += [text[done:at], inserted]
        done = at
    return "".join([*pieces, text[done:]])
