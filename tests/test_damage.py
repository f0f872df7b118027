"""Damage on disk is found: cut and changed files of finished artifacts, of inputs, and of checkpoints."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.frames import write_frames
from support.killing import Toy, toy_provenance
from support.refusals import refused
from typer.testing import CliRunner

from lvctx.artifacts.manifest import MANIFEST, verify_files, write_manifest
from lvctx.cli.app import app
from lvctx.errors import InputError, Stopped
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.run_training import run_training

CPU = ParallelConfig(device="cpu")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file and nothing else about it."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def artifact(folder: Path) -> Path:
    """A finished directory of two files."""
    (folder / "inner").mkdir(parents=True)
    for name in ("a.bin", "inner/b.bin"):
        (folder / name).write_bytes(os.urandom(1000))
    write_manifest(folder, toy_provenance(), ["a.bin", "inner/b.bin"])
    return folder


@pytest.mark.parametrize("spoil", [cut, Path.unlink])
def test_a_finished_run_with_a_spoiled_file_is_not_finished(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    run_training(Toy(tmp_path), CPU, RunControl(out=tmp_path))
    whole = (tmp_path / "model.safetensors").read_bytes()
    spoil(tmp_path / "model.safetensors")
    with refused(InputError, str(tmp_path / "model.safetensors")):
        run_training(Toy(tmp_path), CPU, RunControl(out=tmp_path))
    run_training(Toy(tmp_path), CPU, RunControl(out=tmp_path, force=True))
    assert (tmp_path / "model.safetensors").read_bytes() == whole


def test_inputs_are_compared_with_their_hashes_before_training(tmp_path: Path) -> None:
    task = Toy(tmp_path / "out")
    task.inputs = [artifact(tmp_path / "data"), tmp_path / "no artifact"]
    flip(tmp_path / "data" / "a.bin")
    with refused(InputError, "data/a.bin"):
        run_training(task, CPU, RunControl(out=task.out))
    assert task.calls == 0
    flip(tmp_path / "data" / "a.bin")
    run_training(task, CPU, RunControl(out=task.out))


def test_a_file_is_read_again_only_after_it_changed(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "data")
    file = folder / "inner" / "b.bin"
    assert verify_files(folder) == 2
    before = file.stat().st_mtime_ns
    flip(file)
    with refused(InputError, "b.bin"):
        verify_files(folder)
    os.utime(file, ns=(before, before))
    assert verify_files(folder) == 2, "the inode, size and time at which it was found correct"
    with refused(InputError, "b.bin"):
        verify_files(folder, cached=False)


@pytest.mark.parametrize("name", ["../a.bin", "/etc/passwd", "", "a\0"])
def test_a_manifest_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    folder = artifact(tmp_path / "data")
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"a.bin"', '"' + name.replace("\0", "\\u0000") + '"'))
    with refused(InputError, f"data/{MANIFEST}"):
        verify_files(folder)


def test_info_verifies_directories_and_frames(tmp_path: Path) -> None:
    def info(path: Path) -> int:
        done = CliRunner().invoke(app, ["info", str(path), "--verify", "--json"])
        assert done.exit_code in (0, 3), done.output
        return done.exit_code

    frames = tmp_path / "a.frames.safetensors"
    made = toy_provenance()
    write_frames(frames, torch.randn(3, 4, 5), [0.0, 1.0, 2.0], [0, 1, 2], made)
    folder = artifact(tmp_path / "data")
    assert [info(frames), info(folder)] == [0, 0]
    flip(folder / "a.bin")
    data = bytearray(frames.read_bytes())
    data[-50] ^= 1
    frames.write_bytes(data)
    assert [info(frames), info(folder)] == [3, 3]
    (folder / MANIFEST).unlink()
    (folder / "config.json").write_text("{}")
    assert info(folder) == 3


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("exploded",)


def plant(path: Path) -> None:
    """Replace a checkpoint by one in torch's own format."""
    shutil.rmtree(path)
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))


def in_file(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda path: spoil(next(path.glob("*.safetensors")))


@pytest.mark.parametrize(
    "spoil",
    [in_file(flip), in_file(cut), in_file(Path.unlink), lambda path: cut(path / MANIFEST), plant],
    ids=["flip", "cut", "unlink", "manifest", "pickle"],
)
def test_the_checkpoint_before_a_damaged_one_is_used(
    spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = Toy(tmp_path / "whole").run()
    with pytest.raises(Stopped):
        Toy(tmp_path / "parts", stop_at=11).run()
    older, newest = sorted((tmp_path / "parts" / "checkpoint").glob("step-*"))
    spoil(newest)
    resumed = Toy(tmp_path / "parts")
    assert all(map(torch.equal, resumed.run(), expected))
    assert resumed.calls == 2 * (6 - int(older.name[-2:]))
    assert [record for record in caplog.records if str(newest) in record.getMessage()]
    for path in (tmp_path / "parts" / "checkpoint").glob("step-*"):
        spoil(path)
    with refused(InputError, "parts/checkpoint"):
        Toy(tmp_path / "parts").run()
    assert not Path("exploded").exists()
