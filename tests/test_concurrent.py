"""Several processes of one command on one output: it ends right, or is refused in one line."""

import json
from pathlib import Path

import pytest
from support.small_commands import COMMANDS, contents, lvctx, start

WAIT = ("encode-video", "niah haystack")
"""They wait for each other, since processes of one run may need the same file."""


@pytest.mark.nano
@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("pack-text", "extend-lm", "align")])
def test_several_processes_on_one_output(name: str, small_inputs: Path, tmp_path: Path) -> None:
    together, alone = tmp_path / "together" / "x", tmp_path / "alone" / "x"  # some write the folder's name
    processes = [start(small_inputs, *COMMANDS[name], "-o", together) for _ in range(3)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for code, err in zip(codes, said, strict=True):
        lines = [line for line in err.splitlines() if line.startswith("lvctx: ")]
        assert code == 0 or (code, len(lines)) == (3, 1), err
        assert "Traceback" not in err
    if name in WAIT:
        assert codes == [0, 0, 0], said
    done = lvctx(small_inputs, *COMMANDS[name], "-o", alone)
    assert done.returncode == 0, done.stderr
    assert contents(together) == contents(alone)
    log = together / "results.jsonl"
    keys = [json.loads(line)["key"] for line in log.read_text().splitlines()] if log.exists() else []
    assert len(keys) == len(set(keys))
