"""The store: a file is absent or complete; finished work is recognised; incomplete rows are redone."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import refused

from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.artifacts.lock import only_writer
from lvctx.artifacts.manifest import Provenance, is_finished, read_manifest, read_provenance, write_manifest
from lvctx.artifacts.result_log import ResultLog, read_results
from lvctx.artifacts.store import atomic_file, fingerprint, read_safetensors_header, save_tensors, write_json
from lvctx.artifacts.stream import read_references
from lvctx.errors import InputError


def provenance(**config: object) -> Provenance:
    return Provenance(schema="lvctx.frames/1", command="encode-video", config=config, inputs={"video": "ab" * 32})


def fail_halfway(target: Path) -> None:
    with atomic_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})
    with pytest.raises(RuntimeError):
        fail_halfway(target)
    assert json.loads(target.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_killed_writer_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    """kill -9 while bytes are being written: the name never shows a part of them."""
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from lvctx.artifacts.store import atomic_file
        with atomic_file(Path(sys.argv[1])) as partial, open(partial, "wb") as f:
            while True:
                f.write(b"x" * 4096)
                f.flush()
                print("writing", flush=True)
    """)
    target = tmp_path / "big.bin"
    child = subprocess.Popen([sys.executable, "-c", script, target], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not target.exists()
    with atomic_file(target) as partial:  # the next run is not disturbed by what the dead one left
        partial.write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["big.bin"]


def test_what_a_killed_safetensors_leaves_is_removed_by_the_next_run(tmp_path: Path) -> None:
    """It writes to a temporary file of a name of its own first."""
    target, rounds = tmp_path / "big.safetensors", 0
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        from lvctx.artifacts.store import save_tensors
        big = {"a": np.zeros(40 << 20, np.float32)}
        while True:
            save_tensors(Path(sys.argv[1]), big, {})
    """)
    while rounds < 2:
        child = subprocess.Popen([sys.executable, "-c", script, target])
        while not any(p.is_file() for p in tmp_path.rglob(".tmp*")):
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        rounds += any(p.is_file() for p in tmp_path.rglob(".tmp*"))
    save_tensors(target, {"a": np.zeros(3)}, {})
    assert os.listdir(tmp_path) == ["big.safetensors"]


def test_full_disk_is_one_line_and_leaves_nothing() -> None:
    target = Path("/dev/shm") / f"lvctx-test-{os.getpid()}"
    target.mkdir()
    try:
        code = textwrap.dedent("""
            import resource, signal, sys
            from pathlib import Path
            import numpy as np
            from lvctx.artifacts.store import save_tensors
            from lvctx.errors import InputError
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # writes past 1000 bytes fail
            try:
                save_tensors(Path(sys.argv[1]) / "x.safetensors", {"a": np.zeros(9999)}, {})
            except InputError as e:
                print(e)
        """)
        done = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True, check=True)
        assert "cannot write" in done.stdout
        assert "x.safetensors" in done.stdout
        assert os.listdir(target) == []
    finally:
        target.rmdir()


def test_same_tensors_same_bytes_and_provenance_comes_back(tmp_path: Path) -> None:
    tensors = {"features": np.arange(6, dtype=np.float32).reshape(2, 3), "index": np.arange(2)}
    for name in ("a", "b"):
        save_tensors(tmp_path / name, tensors, provenance(fps=1).to_metadata())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stored = read_provenance(tmp_path / "a")
    assert stored is not None
    assert stored["config"] == {"fps": 1}
    assert read_safetensors_header(tmp_path / "a")["features"]["shape"] == [2, 3]


def test_a_cut_safetensors_file_is_refused_at_every_length(tmp_path: Path) -> None:
    save_tensors(tmp_path / "whole", {"a": np.arange(4)}, {})
    whole = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with refused(InputError, "cut"):
            read_safetensors_header(cut)


def test_finished_work_is_recognised_and_another_runs_is_refused_with_the_difference(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_finished(out, provenance(fps=1))
    write_json(out / "part.json", [1])
    assert not is_finished(out, provenance(fps=1)), "no manifest: unfinished"
    write_manifest(out, provenance(fps=1), ["part.json"], rows=7)
    assert is_finished(out, provenance(fps=1))
    assert read_manifest(out)["rows"] == 7
    with pytest.raises(InputError, match="fps: 1 -> 2"):
        is_finished(out, provenance(fps=2))
    assert not is_finished(out, provenance(fps=2), force=True)
    with refused(InputError, "none"):
        is_finished(tmp_path / "none", provenance(), resume="must")


def test_fingerprint_changes_with_any_byte_and_any_name(tmp_path: Path) -> None:
    seen = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "1")):
        folder = tmp_path / f"{name}{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        seen.add(fingerprint(folder))
    assert len(seen) == 3


@given(st.lists(st.dictionaries(st.text(min_size=1), st.integers() | st.text()), min_size=1, max_size=5), st.data())
def test_a_result_log_survives_a_cut_at_any_byte(rows: list[dict[str, object]], data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.jsonl"
        keyed = {str(i): row for i, row in enumerate(rows)}
        made_of = {"model": "a", "files": ("b", "c")}
        with ResultLog.open(path, made_of) as log:
            stored = [log.append(key, row) for key, row in keyed.items()]
        assert read_jsonl(path) == json.loads(json.dumps(stored))
        raw = path.read_bytes()
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
        with ResultLog.open(path, made_of) as log:
            for key, row in keyed.items():
                if key not in log:
                    log.append(key, row)
        assert path.read_bytes() == raw


def test_a_result_log_is_of_one_run_and_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"

    def refused(where: object, what: str, made_of: dict[str, object], **options: Any) -> None:
        with pytest.raises(InputError) as e, ResultLog.open(path, made_of, **options):
            pass
        assert (e.value.where, what in e.value.what) == (where, True)

    run = {"model": "a", "seed": 0}
    refused(path.parent, "nothing to resume", run, resume="must")
    with ResultLog.open(path, run) as log:
        log.append("1", {"error": "no video"})
        assert "1" not in log
        log.append("1", {"response": "A"})
        refused(path.parent, "another process", run)
        with ResultLog.open(path, run, shared=True) as other:
            assert "1" in other
    refused(path.parent, "(other seed)", {"model": "a", "seed": 1})
    refused(path.parent, "(other model, seed, video)", {"video": "b"})
    refused(path.parent, "results already", run, resume="never")
    path.write_bytes(path.read_bytes() + b'{"key": 5}\n')
    refused(f"{path}:3", "without a key", run)
    with ResultLog.open(path, {"video": "b"}, resume="never", force=True) as log:
        assert not log.keys
    assert sorted(p.name for p in path.parent.iterdir()) == ["results.jsonl"]
    with ResultLog.open(path, {"video": "b"}, resume="must") as log:
        log.append("1", {"response": "B"})
        log.append("2", {"error": "lost"})
    assert {place: row["key"] for place, row in read_results(path.parent).items()} == {
        f"{path}:1": "1",
        f"{path}:2": "2",
    }


def test_a_malformed_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key":"a"}\n{"key":\n')
    with refused(InputError, "results.jsonl:2"):
        read_jsonl(path)


def test_references_are_paths_or_objects_and_unknown_keys_pass_through() -> None:
    lines = ["a.mp4\n", "\n", '{"path": "b.mp4", "note": 1}\n']
    assert list(read_references(lines)) == [(Path("a.mp4"), {}), (Path("b.mp4"), {"path": "b.mp4", "note": 1})]
    with refused(InputError, "stdin:1"):
        list(read_references(['{"path": ']))


def test_no_clock_in_artifacts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name / "part.json", [1])
        write_manifest(tmp_path / name, provenance(fps=1), ["part.json"])
        time.sleep(0.01)
    assert (tmp_path / "a" / "MANIFEST.json").read_bytes() == (tmp_path / "b" / "MANIFEST.json").read_bytes()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None is mounted here, so the system's answer is the only thing that is not real."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_writer(tmp_path / "x"):
        (tmp_path / "x" / "file").write_text("written")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["file"]
    assert "no locks" in caplog.text
    assert str(tmp_path / "x") in caplog.text
