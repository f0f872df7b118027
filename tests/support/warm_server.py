"""Runs `lvctx` command lines in forks of a process that has torch and transformers imported already.

Tests start commands by the script that `start` writes, or those that get signals as a `Command`. What runs is the
program itself, with its own arguments, folder, environment, standard streams and exit status; only the imports are not
repeated. The script `torchrun` beside it is torchrun, whose ranks are such forks.

    python warm_server.py SOCKET

A command with the variable KILL_AFTER is killed with -9 after so many seconds; its exit status is 137.
"""

import atexit
import contextlib
import gc
import json
import math
import os
import pkgutil
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("lvctx.inference.lmms_eval",)
"""Modules that need packages which the suite does without."""
PRELOADED = (
    *(module.name for module in pkgutil.walk_packages([str(ROOT / "lvctx")], "lvctx.") if module.name not in EXTRAS),
    *(
        "av",
        "av.subtitles.stream",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "numpy.ctypeslib",
        "numpy.ma",
        "peft",
    ),
    *("PIL.JpegImagePlugin", "PIL.PngImagePlugin", "pydantic", "rich.console", "rich.table"),
    *("torch._dynamo", "torch.distributed.run", "transformers.generation.utils"),
    *(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("bloom", "clip", "llama", "llava_onevision", "qwen2", "qwen2_5_vl", "qwen2_vl", "siglip")
    ),
)
LIMITS = "WARM_LIMITS"
"""Variable of `SECONDS,BYTES`: a command that runs longer is killed (exit 142), one that takes more memory fails."""
PID_FILE = "WARM_PID_FILE"
"""Variable of a path that the process ID of the command is written to."""
CLIENT = """\
#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode("utf-8", "surrogateescape")
socket.send_fds(server, [b"%12d" % len(request)], [0, 1, 2])
server.sendall(request)
status = server.recv(12)
os._exit(int(status) if status else 70)
"""


@cache
def start() -> Path:
    """The path of a script `lvctx`, whose server ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="lvctx-warm-"))
    address = str(folder / "socket")
    for name in ("lvctx", "torchrun"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=address))
        (folder / name).chmod(0o755)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdin=subprocess.DEVNULL)
    atexit.register(server.kill)
    deadline = time.monotonic() + 300
    while not Path(address).exists():
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.05)
    return folder / "lvctx"


def torchrun(ranks: int) -> list[str]:
    """The start of a command line of `lvctx` in several ranks on this machine."""
    return [str(start().with_name("torchrun")), "--standalone", "--nproc-per-node", str(ranks), "-m", "lvctx"]


class Command(subprocess.Popen[str]):
    """A started command; signals go to the command itself. If a signal ends it, its exit status is 128 + the signal."""

    def __init__(self, *arguments: object, **options: Any) -> None:
        file, self.pid_file = tempfile.mkstemp(dir=start().parent)
        os.close(file)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {}), PID_FILE: self.pid_file}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        super().__init__([str(start()), *map(str, arguments)], env=environment, text=True, **streams)

    def send_signal(self, sig: int) -> None:
        while not (number := Path(self.pid_file).read_text()):
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), sig)


def serve(address: str) -> None:
    """Fork for every request; the fork forks again, so that it can send the exit status of the command."""
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # as lvctx.__main__ does
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    gc.disable()
    for name in PRELOADED:
        import_module(name)
    get_checkpoint_conversion_mapping("llama")  # compiles ten thousand regular expressions, once a process
    gc.freeze()
    gc.enable()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        length, fds, _, _ = socket.recv_fds(connection, 12, 3)
        request = b""
        while len(request) < int(length):
            request += connection.recv(1 << 20)
        arguments, folder, environment = json.loads(request.decode("utf-8", "surrogateescape"))
        pid_file = environment.pop(PID_FILE, None)
        child = os.fork()
        if not child:
            connection.close()
            return run(arguments, folder, environment, fds)
        if pid_file:
            Path(pid_file).write_text(str(child))
        for fd in fds:
            os.close(fd)
        killer = threading.Timer(float(environment.get("KILL_AFTER", "inf")), os.kill, (child, 9))
        if killer.interval < math.inf:
            killer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killer.cancel()
        with contextlib.suppress(OSError):
            connection.sendall(b"%12d" % (status if status >= 0 else 128 - status))
        os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str], fds: list[int]) -> None:
    """The program, as `python -m lvctx` runs it, but that memory is left to the system when it is over."""
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    limits = environment.pop(LIMITS, None)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    script = Path(arguments[0])
    sys.argv = [script.name, *arguments[1:]]
    from lvctx.__main__ import main

    if limits:
        seconds, size = map(int, limits.split(","))
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))
        signal.alarm(seconds)
    try:
        if script.name == "torchrun":
            at = arguments.index("-m")
            sys.argv = [*arguments[:at], "--no-python", str(script.with_name("lvctx")), *arguments[at + 2 :]]
            runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
        else:
            main()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            # Taking apart every module that was imported takes longer than most of the commands.
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise


if __name__ == "__main__":
    serve(sys.argv[1])
