"""Visual Haystacks, single needle: yes or no about one picture among many (Wu et al. 2024, arXiv:2407.13766).

Chance is 50%. A reply is right where the right word is among its words, as in the authors' script. The effective length
is the largest number of pictures with at least 60% right.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvctx.bench.choice import Sample, is_stuck
from lvctx.bench.interval import clustered_mean
from lvctx.bench.tables import need, read_questions
from lvctx.errors import InputError

NAME = "vhs"
STYLES = ("official",)
THRESHOLD = 0.6


def samples(path: Path) -> list[Sample]:
    """Questions from visual_haystack_N.json files; pictures are shuffled, always the same way for the same question."""
    found = []
    for number, row in enumerate(read_questions(path)):
        need(row, "conversations", "pos_image", "neg_image")
        try:
            question, answer = (str(turn["value"]) for turn in row["conversations"][:2])
        except (KeyError, TypeError, ValueError):
            raise InputError("no question and answer in `conversations`", where=row["_file"]) from None
        name = f"{Path(row['_file']).stem}-{number}"
        images = [*row["pos_image"], *row["neg_image"]]
        random.Random(name).shuffle(images)
        found.append(
            Sample(
                id=name,
                video=name,
                images=tuple(map(str, images)),
                question=question,
                answer=answer.strip().lower(),
                groups={"images": str(len(images))},
                released=row,
            )
        )
    return found


def prompt(sample: Sample, style: str, subtitles: str | None) -> str:
    """The user's turn after the pictures."""
    return f"You are given a set of images. Please answer the following question in Yes or No: {sample.question}"


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by number of pictures, the share of replies that say yes or no, and the effective length."""
    said = [set(re.findall(r"[a-z]+", row["response"].lower())) for row in rows]
    right = [float(row["answer"] in words) for row, words in zip(rows, said, strict=True)]
    by = {}
    for size in sorted({int(row["groups"]["images"]) for row in rows}):
        at = [i for i, row in enumerate(rows) if int(row["groups"]["images"]) == size]
        estimate = clustered_mean([right[i] for i in at], [rows[i]["id"] for i in at])
        by[str(size)] = {"words": vars(estimate) | {"parsed": sum(bool(said[i] & {"yes", "no"}) for i in at) / len(at)}}
    good = [int(size) for size, e in by.items() if e["words"]["mean"] >= THRESHOLD]
    whole = vars(clustered_mean(right, [row["id"] for row in rows]))
    whole["parsed"] = sum(bool(words & {"yes", "no"}) for words in said) / len(rows)
    shares = {word: sum(word in words for words in said) / len(rows) for word in ("yes", "no")}
    warnings = [f"{share:.0%} of the replies say {word}" for word, share in shares.items() if share >= 0.9]
    stuck = sum(is_stuck(row["response"]) for row in rows)
    return {
        "warnings": [*warnings, *([f"{stuck} replies repeat one token"] if stuck else [])],
        "questions": len(rows),
        "videos": len(rows),
        "rules": {"words": whole},
        "by_images": by,
        "effective_length": max(good, default=0),
    }
