"""Some mutated inputs of every kind; `make fuzz` runs 10,000 of each."""

import os
import signal
from pathlib import Path
from random import Random
from unittest import mock

import pytest
from fuzz.driver import Fuzzer, fuzz, suspects
from support import broken, limited


@pytest.fixture(scope="module")
def fuzzer(tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    folder = tmp_path_factory.mktemp("fuzz")
    vlm = broken.save_vlm(broken.save_lm(folder / "lm"), tiny_tower, folder / "vlm")
    return Fuzzer(folder, vlm)


KINDS = "safetensors config template recipe subtitles json jsonl csv parquet image responses video"


@pytest.mark.parametrize("kind", KINDS.split())
def test_mutated_inputs(fuzzer: Fuzzer, kind: str) -> None:
    assert set(fuzzer.kinds) == set(KINDS.split())
    found = fuzz(fuzzer, kind, range(1 if kind == "video" else 4))
    assert not found, "\n".join(found)


def test_inputs_together(fuzzer: Fuzzer) -> None:
    """A process that runs many inputs continues after one that kills it and after one that ends badly."""
    first = [Random(f"ends {seed}").random() for seed in range(6)]

    def ends(rng: Random) -> list[object]:
        seed = first.index(rng.random())
        if seed in (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        assert seed != 5
        return ["info", fuzzer.vlm] if seed == 0 else ["info"]

    with mock.patch.dict(fuzzer.kinds, ends=ends), mock.patch.object(limited, "CODES", (0, 3)):
        assert [*suspects(fuzzer, "ends", range(6))] == [1, 2, 3, 4, 5]
