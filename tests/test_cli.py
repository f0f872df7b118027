"""Errors of commands: each is one line with the right exit code."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support import warm_server

from lvctx import __version__
from lvctx.cli.app import MODULES


def lvctx(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm_server.start(), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def on_terminal(*args: object, columns: int = 100) -> str:
    """What a command writes to stdout on a terminal."""
    master, slave = pty.openpty()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": str(columns), "NO_COLOR": "1"}
    with subprocess.Popen(
        [warm_server.start(), *map(str, args)], env=env, stdout=slave, stderr=subprocess.PIPE
    ) as process:
        os.close(slave)
        parts: list[bytes] = []
        with contextlib.suppress(OSError):  # a terminal ends with one
            while part := os.read(master, 1 << 16):
                parts.append(part)
        assert process.stderr is not None
        error = process.stderr.read().decode()
    os.close(master)
    assert process.returncode == 0, error
    return b"".join(parts).decode().replace("\r\n", "\n")


def fails(code: int, done: subprocess.CompletedProcess[str], *words: object) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
    assert len(said) == 1, done.stderr
    for word in words:
        assert str(word) in said[0]


def test_version_and_help() -> None:
    assert lvctx("--version").stdout == f"lvctx {__version__}\n"
    text = lvctx("--help").stdout
    listed = re.findall(r"^│ ([a-z][a-z-]*)  ", text, re.M)
    assert listed == list(MODULES), "as the pipeline runs"
    assert "--install-completion" in text


def test_usage_is_2(tmp_path: Path) -> None:
    assert lvctx("extend-lm").returncode == 2
    assert lvctx("nonsense").returncode == 2
    assert lvctx("extend-lm", "--model", "m", "-o", tmp_path, "--steps", "-1").returncode == 2


def test_info_describes_a_model(tiny_lm: Path) -> None:
    facts = json.loads(lvctx("info", tiny_lm, "--json").stdout)
    assert facts["model"]["architecture"] == "LlamaForCausalLM"
    assert facts["model"]["context"] == 512
    fails(3, lvctx("info", "/nowhere"), "/nowhere", "no such file")


def test_on_a_terminal_a_person_is_answered(tiny_lm: Path) -> None:
    assert re.search(r"^model.context +512 *$", on_terminal("info", tiny_lm), re.M)
    assert json.loads(on_terminal("info", tiny_lm, "--json"))["model"]["context"] == 512


def test_a_model_without_its_shard_and_no_model_at_all(tiny_lm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_lm / "config.json").read_text())
    out = tmp_path / "out"
    fails(3, lvctx("extend-lm", "--model", tmp_path, "--steps", 0, "-o", out), "missing model.safetensors", tmp_path)
    fails(3, lvctx("extend-lm", "--model", "./none", "--steps", 0, "-o", out), "no such model directory")
    assert not out.exists()


def test_recipe_then_environment_then_flag(tiny_lm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("[extend-lm]\nsteps = 0\nrope-theta = 1e5\nseed = 3\n[other]\nsteps = 0\nrope-theta = 7e5\n")
    base = ("extend-lm", "--model", tiny_lm, "-o", tmp_path / "x", "--dry-run")

    def theta(*extra: object, **env: str) -> float:
        done = lvctx(*base, *extra, **env)
        assert done.returncode == 0, done.stderr
        return float(json.loads(done.stdout)["rope_theta"])

    assert theta("--steps", 0) == 1e9
    assert theta("--recipe", recipe) == 1e5
    assert theta("--recipe", f"{recipe}#other") == 7e5
    assert theta("--recipe", recipe, LVCTX_EXTEND_LM_ROPE_THETA="2e5") == 2e5
    assert theta("--recipe", recipe, "--rope-theta", "3e5", LVCTX_EXTEND_LM_ROPE_THETA="2e5") == 3e5
    fails(3, lvctx(*base, "--recipe", f"{recipe}#none"), "no section [none]")
    fails(3, lvctx(*base, "--recipe", tmp_path / "none.toml"), "none.toml")
    recipe.write_text("[extend-lm]\nstep = 0\n")
    fails(3, lvctx(*base, "--recipe", recipe), "unknown key 'step'")
    recipe.write_text("[extend-lm\n")
    fails(3, lvctx(*base, "--recipe", recipe), "not valid TOML")


def test_finished_is_done_at_once_and_another_configuration_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    base = ("extend-lm", "--model", tiny_lm, "--steps", 0, "-o", tmp_path / "x")
    first = lvctx(*base, "--rope-theta", "2e5")
    assert first.returncode == 0, first.stderr
    row = json.loads(first.stdout)
    assert row["schema"] == "lvctx.model/1"
    before = (tmp_path / "x" / "model.safetensors").stat().st_mtime_ns
    assert lvctx(*base, "--rope-theta", "2e5").stdout == first.stdout
    assert (tmp_path / "x" / "model.safetensors").stat().st_mtime_ns == before
    fails(3, lvctx(*base, "--rope-theta", "3e5"), "rope_theta: 200000.0 -> 300000.0", "--force")
    assert lvctx(*base, "--rope-theta", "3e5", "--force").returncode == 0
    again = lvctx("extend-lm", "--model", tiny_lm, "--steps", 0, "-o", tmp_path / "y", "--rope-theta", "3e5")
    assert json.loads(again.stdout)["sha256"] == json.loads(lvctx(*base, "--rope-theta", "3e5").stdout)["sha256"]


def test_a_closed_pipe_is_141_and_silent(tmp_path: Path) -> None:
    """`lvctx ... | head -1`: the reader leaves after one line; what was written stays."""
    code = textwrap.dedent("""
        import typer
        from lvctx.cli import app as program, output
        @program.app.command("flood")
        def flood() -> None:
            while True:
                output.emit({"line": "x" * 1000})
        program.app()
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", code, "flood"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.wait(timeout=30) == 141
    assert child.stderr.read() == ""
    child.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals(number: signal.Signals, code: int) -> None:
    # A shell starts what it sends to the background deaf to Ctrl-C, and so may be whoever runs these tests.
    script = textwrap.dedent("""
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lvctx.cli import app as program
        @program.app.command("wait")
        def wait() -> None:
            print("ready", flush=True)
            time.sleep(60)
        program.app()
    """)
    child = subprocess.Popen(
        [sys.executable, "-c", script, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.1)
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert child.returncode == code
    assert said.count("\n") == 1
    assert "run the same command again" in said


def test_a_bug_of_ours_shows_its_traceback_and_exits_1() -> None:
    script = textwrap.dedent("""
        from lvctx.cli import app as program
        @program.app.command("bug")
        def bug() -> None:
            {}["missing"]
        program.app()
    """)
    done = subprocess.run([sys.executable, "-c", script, "bug"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError" in done.stderr


def test_a_full_disk_is_3_and_loses_nothing(tiny_lm: Path, tmp_path: Path) -> None:
    """Writes past 100 kB fail as on a full disk; the existing file is kept."""
    out = tmp_path / "x"
    script = textwrap.dedent("""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        from lvctx.__main__ import main
        sys.argv[0] = "lvctx"
        main()
    """)
    flags = ["extend-lm", "--model", str(tiny_lm), "--steps", "0", "-o", str(out)]
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True)
    fails(3, done, "cannot write", "free some space")
    assert not (out / "MANIFEST.json").exists()
    assert lvctx(*flags).returncode == 0


def test_vqa_refuses_what_it_cannot_watch(tiny_lm: Path, tmp_path: Path) -> None:
    fails(2, lvctx("vqa", tmp_path / "x", "--model", tiny_lm, "--ask", "Why?"), "has no vision tower")
