"""An OpenAI-compatible server on this machine that misbehaves as it is asked to, and remembers what it was sent.

Its answer is a letter that depends on the question alone, so an answer that went astray would be noticed.
"""

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "served"


def text_of(body: dict[str, Any]) -> str:
    """The text of a request's last turn, without the times of frames."""
    if "prompt" in body:
        return str(body["prompt"])
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else str(content[-1]["text"])


def letter(text: str) -> str:
    """The answer to a question."""
    return "ABCD"[hashlib.sha256(text.encode()).digest()[0] % 4]


class FaultServer(ThreadingHTTPServer):
    """`fault` gives each request, by its number and body, what to do wrong; None is a proper answer."""

    daemon_threads = True

    def __init__(self, fault: Callable[[int, dict[str, Any]], str | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.turn = fault, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        """Bodies, in the order in which they came."""
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.reply: Callable[[dict[str, Any]], dict[str, Any]] = lambda body: {"content": letter(text_of(body))}
        """The message that answers a request; `finish_reason` and further fields of `choice` are the choice's."""

    @property
    def url(self) -> str:
        """For --endpoint."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are a part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def send(self, status: int, body: Any, *, length: int | None = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")  # so that no thread waits for a further request when a test has ended
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """The list of models."""
        fault = self.server.fault(0, {})
        if fault == "401":
            self.send(401, {"error": {"message": f"no such key: {self.headers['Authorization']}"}})
        elif fault == "no list":
            self.send(404, {"detail": "Not Found"})
        else:
            self.send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        """A completion."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.turn:
            self.server.requests.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            number = len(self.server.requests)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self.answer(body, self.server.fault(number, body))
        finally:
            with self.server.turn:
                self.server.at_once -= 1

    def answer(self, body: dict[str, Any], fault: str | None) -> None:
        name, _, argument = (fault or "").partition(":")
        message = self.server.reply(body)
        choice = {"index": 0, "finish_reason": message.pop("finish_reason", "stop")}
        choice |= message.pop("choice", {})
        choice |= {"text": message["content"]} if "prompt" in body else {"message": {"role": "assistant", **message}}
        usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
        good = {"object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
        if name == "slow":
            time.sleep(float(argument))
            self.send(200, good)
        elif name == "drip":
            self.drip(json.dumps(good).encode(), float(argument))
        elif name == "busy":
            self.send(429, {"error": {"message": "too many requests"}}, headers={"Retry-After": argument})
        elif name == "half":
            data = json.dumps(good).encode()
            self.send(200, data[: len(data) // 2], length=len(data))
            self.close_connection = True
        elif name == "malformed":
            self.send(200, b'{"choices": [')
        elif name == "empty":
            self.send(200, {"choices": []})
        elif name == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif name.isdigit():
            self.send(int(name), {"error": {"message": argument or "it went wrong", "code": int(name)}})
        else:
            assert not name, name
            self.send(200, good)

    def drip(self, data: bytes, seconds: float) -> None:
        """A byte now and then, so that no single read waits long."""
        self.send(200, b"", length=len(data))
        for i in range(len(data)):
            time.sleep(seconds)
            self.wfile.write(data[i : i + 1])
            self.wfile.flush()


@contextmanager
def faults(fault: Callable[[int, dict[str, Any]], str | None] = lambda number, body: None) -> Iterator[FaultServer]:
    """A server in a thread of this process."""
    with FaultServer(fault) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
