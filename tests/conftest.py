"""Fixtures: the nano assets (a real small language model, essays, clips) and tiny random models for unit tests."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Nano:
    """The real small inputs of the demo."""

    lm: Path
    essays: Path
    clips: Path


@pytest.fixture(scope="session")
def nano() -> Nano:
    """SmolLM2-135M-Instruct, essays and clips, fetched once into `.cache/nano`."""
    base = ROOT / ".cache" / "nano"
    subprocess.run([sys.executable, ROOT / "recipes" / "nano" / "fetch.py", "-o", base], check=True)
    return Nano(lm=base / "lm", essays=base / "essays", clips=base / "clips")
