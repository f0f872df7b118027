"""Some mutated inputs of every kind; `make fuzz` runs 10,000 of each."""

from pathlib import Path

import pytest
from fuzz.driver import Fuzzer, fuzz
from support import broken


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
