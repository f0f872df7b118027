"""Servers of other runtimes in environments of their own, and the tiny models that they run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from runtimes.served import served

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests" / "runtimes"
ENVIRONMENTS = ROOT / os.environ.get("RUNTIMES", ".runtimes")
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # functions would be compiled by a C++ compiler
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def environment(name: str) -> Path:
    """The environment of a script of tests/runtimes, made if it is not there; skips the test where it cannot be."""
    path = ENVIRONMENTS / name
    if not (path / ".ready").is_file():
        ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
        command = [SCRIPTS / f"{name}.sh", "-", path]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"{name} cannot be installed: {reason}")
    return path


def tiny_model(name: str) -> Path:
    """A model of tests/runtimes/models.py; all are made if it is not there."""
    out = ROOT / "runs" / "runtimes"
    if not (out / name / "config.json").is_file():
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, SCRIPTS / "models.py", out], check=True, env=env)
    return out / name


@contextmanager
def _started(command: list[object], log: Path, **variables: str) -> Iterator[str]:
    """The address of a server's API; the server has ended afterwards."""
    with (
        mock.patch.dict(os.environ, VARIABLES | variables),
        served([str(word) for word in command], log) as address,
    ):
        yield f"{address}/v1"


@contextmanager
def vllm_server(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """vLLM's server, in float32."""
    python = environment("vllm") / "bin" / "python"
    exact = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *exact, *flags]
    with _started(command, log) as url:
        yield url


@contextmanager
def llama_server(model: Path, folder: Path) -> Iterator[str]:
    """llama.cpp's server; the model is converted in `folder`."""
    path = environment("llama_cpp")
    command = [sys.executable, SCRIPTS / "serve_llama_cpp.py", model, folder / f"{model.name}.gguf"]
    with _started(command, folder / "server.log", PYTHONPATH=f"{path / 'packages'}:{path / 'source'}") as url:
        yield url


@contextmanager
def transformers_server(log: Path) -> Iterator[str]:
    """`transformers serve`, which loads the model that a request names."""
    python = environment("trl") / "bin" / "python"
    command = [python, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--dtype", "float32"]
    with _started(command, log) as url:
        yield url
