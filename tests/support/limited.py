"""Commands under limits: what damaged or hostile input may cost, and how it may end."""

import os
import subprocess
from pathlib import Path

from support import warm_server

SECONDS, BYTES = 10, 2 << 30
CODES = (0, 2, 3, 4, 5)


def limited(
    *arguments: object, stdin: bytes = b"", seconds: int = SECONDS, size: int = BYTES
) -> subprocess.CompletedProcess[bytes]:
    """A command that is killed after `seconds`, and gets no more than `size` bytes beyond what its imports take."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", warm_server.LIMITS: f"{seconds},{size}"}
    command = [warm_server.start(), *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, timeout=120)


def fault(done: subprocess.CompletedProcess[bytes]) -> str:
    """What is wrong with the end of a command; empty if nothing is."""
    said = done.stderr.decode(errors="replace")
    ours = [line for line in said.splitlines() if line.startswith("lvctx: ")]
    if done.returncode not in CODES or "Traceback" in said:
        return f"exit {done.returncode}: {said.strip()[-300:]}"
    return "" if done.returncode in (0, 2, 4) or ours else f"exit {done.returncode} without a line: {said[-300:]}"


def refused(*arguments: object, code: int = 3, stdin: bytes = b"", where: Path | str = "") -> str:
    """The last line of a command that ends with `code` and names `where`."""
    done = limited(*arguments, stdin=stdin)
    assert not fault(done), fault(done)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == code, said
    ours = [line for line in said.splitlines() if line.startswith("lvctx: ")]
    last = ours[-1] if ours else said  # before it there may be notes
    assert str(where) in last, said
    return last
