"""A Hugging Face hub on this machine: the requests of an upload, answered as the hub does, and remembered."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer(ThreadingHTTPServer):
    """`refuse` gives the status with which the endpoint whose path holds a word is refused."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.refuse: dict[str, int] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        """Method, path, headers and body of each request."""
        self.commits: list[dict[str, bytes]] = []
        """Files of each commit."""

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    """One connection."""

    server: HubServer

    def do_POST(self) -> None:
        """Create a repository, accept a card, say how files are uploaded (all inside the commit), or commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._remember(body)
        if self._refused():
            return
        if self.path == "/api/repos/create":
            name = json.loads(body)
            self._answer({"url": f"{self.server.url}/{name['organization']}/{name['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
            self._answer({"commitOid": "c0ffee" * 6 + "c0de", "commitUrl": f"{self.server.url}/org/m/commit/c0ffee"})
        else:
            self._answer({"error": "not found"}, 404)

    def do_GET(self) -> None:
        """Facts about a repository: there is none before it is created."""
        self._remember(b"")
        if not self._refused():
            self._answer({"error": "Repository not found"}, 404)

    def _remember(self, body: bytes) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers), body))

    def _refused(self) -> bool:
        status = next((status for word, status in self.server.refuse.items() if word in self.path), None)
        if status is not None:
            self._answer({"error": f"refused with {self.headers.get('Authorization')}"}, status)
        return status is not None

    def _answer(self, content: Any, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """A hub, in threads of this process."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
