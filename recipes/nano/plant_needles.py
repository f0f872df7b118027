"""Text to extend a language model on: essays with hidden numbers that the end of the row asks for.

Rows are short and do not mention distances: `extend-lm --pose` moves the question away from the number. From plain
essays a model of this size learns to ignore distant text (recipes/nano-transfer.md). Keys are animals and a needle
test's are cities, and the essays must not be those of its haystack. Every document is one token short of a row, which
its separator fills, so `pack-text` truncates none.

    python recipes/nano/plant_needles.py --tokenizer LM --rows 400 -o planted.jsonl ESSAY.txt ...
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.eval.niah.text_needles import NEEDLE, PREFIX, QUESTION, read_haystack
from lvctx.models.loading import load_tokenizer

KEYS = ("otter", "heron", "badger", "lynx", "walrus", "falcon", "beaver", "gecko", "bison", "stork", "raven", "moose")
ASK, SAY = "What is the special magic {key} number?", "The special magic {key} number is:"


def draw_document(rng: np.random.Generator, story: str, tokenizer: Any, *, needles: int, tokens: int) -> str | None:
    """A document of exactly `tokens` tokens; None where this draw does not come out even."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    keys = rng.permutation(KEYS)[:needles]
    numbers = [str(n) for n in rng.integers(1_000_000, 10_000_000, size=needles)]
    hidden = [NEEDLE.format(city=key, number=number) for key, number in zip(keys, numbers, strict=True)]
    order = rng.permutation(needles)
    asked = [(ASK.format(key=keys[i]), SAY.format(key=keys[i]), numbers[i]) for i in order]
    end = QUESTION.format(question=asked[0][0], start=asked[0][1]) + f" {asked[0][2]}.\n"
    end += "".join(f"Question: {question} Answer: {start} {number}.\n" for question, start, number in asked[1:])
    room = tokens - count(PREFIX) - count("".join(hidden)) - count(end)
    places = np.sort(rng.random(needles))
    after = int(rng.integers(len(story) - 8 * room))
    spans = tokenizer(story[after : after + 8 * room], return_offsets_mapping=True).offset_mapping
    for _ in range(8):
        body = story[after : after + spans[room - 1][1]]
        for place, needle in zip(places[::-1], hidden, strict=True):
            at = body.rfind(". ", 0, int(place * len(body))) + 2  # 1 where there is none: good enough
            body = body[:at] + needle + body[at:]
        text = PREFIX + body + end
        if count(text) == tokens:
            return text
        room += tokens - count(text)
    return None


def main() -> None:
    """Draw the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("essays", type=Path, nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--needles", type=int, default=5, help="a row")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer, story, rows = load_tokenizer(args.tokenizer), read_haystack(args.essays), []
    for seed in itertools.count():
        rng = np.random.default_rng([3, seed])
        text = draw_document(rng, story, tokenizer, needles=args.needles, tokens=args.seq_len - 1)
        rows += [] if text is None else [json.dumps({"text": text})]
        if len(rows) == args.rows:
            break
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
