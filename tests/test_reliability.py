"""Every command that writes, killed, run several times at once, and on a full disk: nothing is lost or spoiled.

`docs/reliability.md` has the table of what is promised.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.small_commands import COMMANDS, NAMES, contents, logged, lvctx, start

from lvctx.artifacts.lock import only_writer

pytestmark = pytest.mark.nano


usual: dict[str, float] = {}
"""How long an undisturbed command takes, in seconds."""


def commands(*in_suite: str) -> Any:
    """All commands; those that the suite leaves to `make test-slow` are marked so."""
    names = [pytest.param(name, marks=[] if name in in_suite else pytest.mark.slow) for name in COMMANDS]
    return pytest.mark.parametrize("name", names)


@pytest.fixture(scope="module")
def undisturbed(small_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a command that nothing disturbed, by its name."""
    outputs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in outputs:
            outputs[name] = tmp_path_factory.mktemp("undisturbed") / NAMES.get(
                name, "x"
            )  # some commands write the folder's name
            began = time.monotonic()
            done = lvctx(small_inputs, *COMMANDS[name], "-o", outputs[name])
            assert done.returncode == 0, done.stderr
            usual[name] = time.monotonic() - began
        return outputs[name]

    return run


def check_equal(out: Path, whole: Path) -> None:
    """The files are those of the undisturbed run and nothing else; every row of a log is there once."""
    assert contents(out) == contents(whole)
    assert logged(out) == logged(whole)


def check_refused(done: subprocess.CompletedProcess[str], where: Path) -> None:
    """One line that names the place, and exit code 3."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert str(where) in lines[-1]


@commands("pack-chat", "mrope-extend", "encode-video")
def test_several_processes_on_one_output(
    name: str, small_inputs: Path, undisturbed: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / NAMES.get(name, "x")
    count = 8 if request.node.get_closest_marker("slow") else 3
    processes = [start(small_inputs, *COMMANDS[name], "-o", out) for _ in range(count)]
    said = [process.communicate(timeout=300) for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes, said
    for process, (_, err) in zip(processes, said, strict=True):
        if process.returncode:
            check_refused(subprocess.CompletedProcess(process.args, process.returncode, "", err), out)
    if name in ("encode-video", "niah haystack"):  # they wait: processes of one run may need the same file
        assert codes == [0] * count, said
    check_equal(out, undisturbed(name))


STRANGE = {"LC_ALL": "C", "HOME": "/nonexistent", "COLUMNS": "20", "TERM": "dumb", "TZ": "Asia/Kathmandu"}
NAMES_OF_FOLDERS = ("a 'quote\" and\na line break, d\u00e9j\u00e0 vu *", "-o", "n" * 240)


@commands("pack-text", "encode-video", "niah text")
def test_a_strange_environment_and_names(
    name: str, small_inputs: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """Neither the locale nor the size of the terminal, the home or the name of a folder changes a byte."""
    for folder in NAMES_OF_FOLDERS:
        (tmp_path / folder).mkdir()
        out = tmp_path / folder / NAMES.get(name, "x")
        done = lvctx(small_inputs, *COMMANDS[name], "-o", out, **STRANGE)
        assert done.returncode == 0, done.stderr
        check_equal(out, undisturbed(name))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@commands("niah text", "mrope-extend --data")
def test_a_full_disk_is_one_line_and_nothing_is_lost(
    name: str, small_inputs: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = undisturbed(name)
    used = sum(path.stat().st_blocks * 512 for path in whole.rglob("*")) if whole.is_dir() else whole.stat().st_size
    with small_disk(tmp_path / "disk", max(used // 2, 8192)) as disk:
        out = disk / NAMES.get(name, "x")
        full = lvctx(small_inputs, *COMMANDS[name], "-o", out)
        check_refused(full, disk)
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        done = lvctx(small_inputs, *COMMANDS[name], "-o", out)
        assert done.returncode == 0, done.stderr
        check_equal(out, whole)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        check_refused(lvctx(small_inputs, *COMMANDS[name], "-o", disk / f"other-{out.name}"), disk)


def kill_often(name: str, kills: int, folder: Path, whole: Path, out: Path) -> None:
    """Kill a command with -9 at random moments, let it end, and compare its output with the undisturbed one's."""
    moments = random.Random(os.environ.get("LVCTX_SEED", name))
    killed = 0
    for _ in range(kills):
        done = lvctx(folder, *COMMANDS[name], "-o", out, KILL_AFTER=f"{moments.uniform(0.01, usual[name]):.3f}")
        assert done.returncode in (0, 137), done.stderr
        killed += done.returncode == 137
        if done.returncode == 0:  # it ended earlier
            check_equal(out, whole)
            subprocess.run(["rm", "-r", str(out)], check=True)
    done = lvctx(folder, *COMMANDS[name], "-o", out)
    assert done.returncode == 0, done.stderr
    assert killed or kills < 5
    check_equal(out, whole)


@pytest.mark.parametrize("name", ["pack-text keep", "pack-chat", "encode-video", "niah text", "videomme run"])
def test_killed_twice(name: str, small_inputs: Path, undisturbed: Callable[[str], Path], tmp_path: Path) -> None:
    """Trainings are in test_resume.py."""
    kill_often(name, 2, small_inputs, undisturbed(name), tmp_path / NAMES.get(name, "x"))


@pytest.mark.parametrize("name", ["extend-lm", "export llava"])
def test_killed_after_its_manifest_was_written(
    name: str, small_inputs: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    """What such a process did not remove, the same command does, unless another one is writing there."""
    out = Path(shutil.copytree(undisturbed(name), tmp_path / "x"))
    (out / "checkpoint" / "step-00000004").mkdir(parents=True)
    for left in (".lock", ".started.json", "checkpoint/step-00000004/MANIFEST.json"):
        (out / left).write_text("")
    with only_writer(out):
        assert lvctx(small_inputs, *COMMANDS[name], "-o", out).returncode == 0
        assert (out / "checkpoint").exists()
    (out / ".lock").write_text("")
    assert lvctx(small_inputs, *COMMANDS[name], "-o", out).returncode == 0
    check_equal(out, undisturbed(name))


@pytest.mark.kill
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_a_hundred_times(
    name: str, small_inputs: Path, undisturbed: Callable[[str], Path], tmp_path: Path
) -> None:
    kill_often(
        name,
        int(os.environ.get("LVCTX_KILLS", "100")),
        small_inputs,
        undisturbed(name),
        tmp_path / NAMES.get(name, "x"),
    )
