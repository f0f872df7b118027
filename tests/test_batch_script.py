"""The batch script for Slurm starts its command, and is queued again at its time limit."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def slurm(folder: Path, step: str) -> dict[str, str]:
    """Environment of a batch job on one node: `srun` is this step, and `scontrol` writes its calls down."""
    folder.mkdir()
    scripts = {"scontrol": f'echo "$@" >> {folder}/calls; [ "$1" = show ] && echo 127.0.0.1 || true', "srun": step}
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "a", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7"}
    return {**os.environ, **job, "PATH": path, "HF_HUB_OFFLINE": "1"}


def test_the_batch_script_starts_the_command(small_inputs: Path, tmp_path: Path) -> None:
    given = "--model lm --data rows --rope-theta 250000 --steps 1 --batch-tokens 128 --dry-run -o lm-batch"
    command = [str(ROOT / "examples/extend-lm.sbatch"), *given.split()]
    env = slurm(tmp_path / "bin", 'shift; exec "$@"')
    done = subprocess.run(command, cwd=small_inputs, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"dry_run": true' in done.stdout
    assert "requeue" not in (tmp_path / "bin" / "calls").read_text()


def test_the_batch_script_is_queued_again_at_its_time_limit(tmp_path: Path) -> None:
    step = f"trap 'echo saved > {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while true; do sleep 0.1; done"
    env = slurm(tmp_path / "bin", step)
    job = subprocess.Popen([ROOT / "examples/extend-lm.sbatch"], env=env)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    assert job.wait(timeout=60) != 0
    assert (tmp_path / "saved").exists(), "the job waits until the run has stored its step"
    assert (tmp_path / "bin" / "calls").read_text().splitlines()[-1] == "requeue 7"
