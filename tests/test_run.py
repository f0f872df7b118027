"""The common life cycle of trainings, tested with a minimal training."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import forks
from support.killing import Toy, toy_provenance
from support.refusals import refused

from lvctx.artifacts.lock import only_writer
from lvctx.errors import InputError, Stopped
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.run_training import run_training

CPU = ParallelConfig(device="cpu")
STEPS = 30


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _train_slowly(out: Path) -> None:
    """A process of the run, which takes long enough to be stopped in its middle."""
    signal.signal(signal.SIGTERM, _stop)
    control = RunControl(out=out, on_progress=lambda done, total, note: time.sleep(0.05))
    try:
        run_training(Toy(out, STEPS), CPU, control)
    except Stopped:
        os._exit(75)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_training_stopped_by_sigterm_ends_with_the_same_bytes(tmp_path: Path) -> None:
    run_training(Toy(tmp_path / "whole", STEPS), CPU, RunControl(out=tmp_path / "whole"))
    parts = tmp_path / "parts"
    forks.ensure_running()
    child = forks.FORKS.Process(target=_train_slowly, args=(parts,))
    child.start()
    log = parts / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        assert child.is_alive(), "ended before it could be stopped"
        time.sleep(0.01)
    child.terminate()
    child.join()
    assert child.exitcode == 75
    done = len(losses(parts))
    assert 5 <= done < STEPS
    assert (parts / "checkpoint" / f"step-{done:08d}").is_dir(), "the last finished step is saved"
    assert not (parts / "MANIFEST.json").exists()
    resumed = Toy(parts, STEPS)
    run_training(resumed, CPU, RunControl(out=parts, resume="must"))
    assert resumed.calls == 2 * (STEPS - done), "no step is repeated"
    assert losses(parts) == losses(tmp_path / "whole")
    for name in ("model.safetensors", "MANIFEST.json"):
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (parts / "checkpoint").exists()


def test_what_is_there_decides_what_is_done(tmp_path: Path) -> None:
    control = RunControl(out=tmp_path)
    run_training(Toy(tmp_path), CPU, control)
    again = Toy(tmp_path)
    run_training(again, CPU, control)
    assert again.calls == 0, "finished is finished"
    other = Toy(tmp_path)
    other.provenance = toy_provenance(seed=1)
    with pytest.raises(InputError, match=r"another run's output \(seed: 0 -> 1\)"):
        run_training(other, CPU, control)
    with only_writer(tmp_path), refused(InputError, str(tmp_path)):
        run_training(other, CPU, RunControl(out=tmp_path, force=True))
    before = load_file(tmp_path / "model.safetensors")
    run_training(other, CPU, RunControl(out=tmp_path, force=True))
    assert other.calls == 12
    assert load_file(tmp_path / "model.safetensors").keys() == before.keys()
    assert json.loads((tmp_path / "MANIFEST.json").read_text())["seed"] == 1
    with refused(InputError, str(tmp_path)):
        run_training(other, CPU, RunControl(out=tmp_path, resume="never"))
    with refused(InputError, "x"):
        run_training(Toy(tmp_path / "x"), CPU, RunControl(out=tmp_path / "x", resume="must"))
