"""Decoding in a separate process, so that a decoder that dies or hangs costs one video and not the run.

The process gets one request per line on stdin and answers on stdout with messages: a kind, a length, a body. It serves
one video after another, and is replaced after a video that it fails on. It does not import torch, so it starts fast.
It decodes ahead as far as its queues and the pipe have room, so decoding overlaps with the caller's work. It gets no
more memory than half of what the machine has: a video that needs more is an error.
"""

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from lvctx import errors
from lvctx.video.frame_list import FrameList
from lvctx.video.reader import DecodeStats, Frame, read_video
from lvctx.video.sampling import VideoSampling
from lvctx.video.squares import square

TIMEOUT = 120.0
"""Seconds within which a decoder has to read at least one packet."""
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
"""Bytes that a decoder may allocate."""
HEAD, FRAME = struct.Struct("<cQ"), struct.Struct("<qd")


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Which frames of which video to decode, and how to make them square."""

    path: str
    """The video."""
    sampling: VideoSampling
    """Which frames, and `frame_mode`: how a frame becomes a square."""
    threads: int | None
    """As in `read_video`."""
    size: int
    """Side of the squares in pixels."""
    background: tuple[int, int, int]
    """Fill colour of `pad`."""

    def to_json(self) -> str:
        """The request for the process; the token resolution and other videos' frames are left out."""
        sampling = replace(self.sampling, hybrid=None, frame_selection="group")
        if (frames := sampling.frames_from) is not None:
            sampling = replace(sampling, frames_from=replace(frames, chosen=(frames.of(Path(self.path)),)))
        return json.dumps(asdict(replace(self, sampling=sampling)))

    @classmethod
    def from_json(cls, line: bytes) -> Self:
        """The inverse of `to_json`."""
        raw = json.loads(line)
        if raw["sampling"]["frames_from"] is not None:
            raw["sampling"]["frames_from"] = FrameList.from_dict(raw["sampling"]["frames_from"])
        return cls(**{**raw, "sampling": VideoSampling(**raw["sampling"])})


class Decoders:
    """Decoding processes; safe to use from several threads. See `TIMEOUT` and `MEMORY`."""

    def __init__(self, *, timeout: float = TIMEOUT, memory: int = MEMORY) -> None:
        self._timeout, self._memory = timeout, memory
        self._idle: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def read(self, request: DecodeRequest, facts: dict[str, Any]) -> Iterator["_Reader"]:
        """The frames of a video, each a square; `facts` is filled once they are exhausted.

        Raises what `read_video` raises, and InputError if the decoder dies or hangs.
        """
        process = self._idle.pop() if self._idle else self._start()
        clean = False
        try:
            reader = _Reader(process, request, facts, self._timeout)
            yield reader
            clean = reader.over
        except errors.LvctxError:
            clean = reader.over
            raise
        finally:
            if clean:
                self._idle.append(process)
            else:
                _end(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        serve = f"from lvctx.video.decode_worker import serve; serve({self._memory})"
        code = f"import sys; sys.path[:] = {sys.path!r}; {serve}"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def close(self) -> None:
        """End the idle processes."""
        while self._idle:
            _end(self._idle.pop())


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


class _Reader(Iterator[Frame]):
    def __init__(self, process: Any, request: DecodeRequest, facts: dict[str, Any], timeout: float) -> None:
        self._process, self._request, self._facts, self._timeout = process, request, facts, timeout
        self.over, self.decoded = False, 0
        with contextlib.suppress(BrokenPipeError):  # reading reports why
            process.stdin.write(request.to_json().encode() + b"\n")

    def __next__(self) -> Frame:
        while not self.over:
            kind, size = HEAD.unpack(self._take(HEAD.size))
            body = self._take(size)
            if kind == b"F":
                index, pts = FRAME.unpack(body[: FRAME.size])
                side = self._request.size
                image = np.frombuffer(body, np.uint8, offset=FRAME.size).reshape(side, side, 3)
                return Frame(index=index, pts=pts, image=image)
            if kind == b"A":
                continue
            self.over = True
            answer = json.loads(body)
            if kind == b"D":
                self._facts.update(answer["facts"])
                self.decoded = int(answer["decoded"])
            elif "bug" in answer:
                raise RuntimeError(answer["bug"])
            else:
                raise getattr(errors, answer["kind"])(answer["what"], where=answer["where"], fix=answer["fix"])
        raise StopIteration

    def _take(self, size: int) -> bytearray:
        body = bytearray(size)
        rest, pipe = memoryview(body), self._process.stdout.fileno()
        while rest:
            if not select.select([pipe], [], [], self._timeout)[0]:
                raise errors.InputError(
                    f"the decoder made no progress for {self._timeout:g} s",
                    where=self._request.path,
                    fix="convert the video",
                )
            count = os.readv(pipe, [rest])
            if count == 0:
                code = self._process.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise self._failed(f"died ({how})")
            rest = rest[count:]
        return body

    def _failed(self, how: str) -> errors.InputError:
        return errors.InputError(f"the decoder {how}", where=self._request.path, fix="convert the video with ffmpeg")


def serve(memory: int) -> None:
    """Main loop of the process: answer requests until stdin ends. `memory` is in bytes."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system has none of this kind
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    out = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not come between messages
    for line in sys.stdin.buffer:
        _Answer(out, DecodeRequest.from_json(line)).run()


class _Answer:
    """The messages about one video."""

    def __init__(self, out: int, request: DecodeRequest) -> None:
        self._out, self._request = out, request
        self._lock, self._over, self._stats = threading.Lock(), threading.Event(), DecodeStats()

    def run(self) -> None:
        beats = threading.Thread(target=self._beat, daemon=True)
        beats.start()
        try:
            kind, answer = b"D", self._frames()
        except errors.LvctxError as e:
            where = None if e.where is None else str(e.where)
            kind, answer = b"E", {"kind": type(e).__name__, "what": e.what, "where": where, "fix": e.fix}
        except Exception:
            kind, answer = b"E", {"bug": traceback.format_exc()}
        self._over.set()
        beats.join()
        self._send(kind, json.dumps(answer).encode())

    def _frames(self) -> dict[str, Any]:
        request = self._request
        reader = read_video(
            Path(request.path), request.sampling, prepare=self._square, threads=request.threads, stats=self._stats
        )
        with errors.memory_errors(where=request.path, fix="convert it to a smaller size with ffmpeg"):
            for frame in reader:
                self._send(b"F", FRAME.pack(frame.index, frame.pts), frame.image.data)
        return {"facts": reader.facts, "decoded": reader.decoded}

    def _square(self, image: np.ndarray) -> np.ndarray:
        request = self._request
        red, green, blue = request.background
        done = square(Image.fromarray(image), request.size, request.sampling.frame_mode or "crop", (red, green, blue))
        return np.ascontiguousarray(np.asarray(done))

    def _beat(self) -> None:
        packets = 0
        while not self._over.wait(1):
            if self._stats.packets != packets:
                packets = self._stats.packets
                self._send(b"A")

    def _send(self, kind: bytes, *parts: Any) -> None:
        with self._lock:
            try:
                for part in (HEAD.pack(kind, sum(memoryview(p).nbytes for p in parts)), *parts):
                    rest = memoryview(part).cast("B")
                    while rest:
                        rest = rest[os.write(self._out, rest) :]
            except BrokenPipeError:
                os._exit(1)  # the parent is gone
