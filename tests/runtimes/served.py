"""A server process on a free port of this machine, and requests to it."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def served(command: list[str], log: Path) -> Iterator[str]:
    """Start `command` with `--host` and `--port`, and stop it at the end; the address. Its output goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("a") as file:
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        with subprocess.Popen(command, stdout=file, stderr=file) as running:
            try:
                _wait(f"http://127.0.0.1:{port}/health", running, log)
                yield f"http://127.0.0.1:{port}"
            finally:
                running.terminate()


def post(url: str, body: dict[str, Any]) -> Any:
    """The answer to a JSON request. Raises RuntimeError with what the server says against it."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as e:
        raise RuntimeError(e.read().decode()) from e


def _wait(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers. Raises RuntimeError if it ends before, or does not within ten minutes."""
    for _ in range(1200):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if running.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()[-300:]}") from None
            time.sleep(0.5)  # it is still loading
    raise RuntimeError("the server does not answer")
