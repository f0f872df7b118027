"""The checks of `make lint` on dependencies: what they accept and refuse, and what happens without a network."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import Distribution
from pathlib import Path

import dependencies
import pytest


def package(folder: Path, name: str, metadata: str) -> Distribution:
    """An installed package with these lines of metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{metadata}\n")
    return Distribution.at(info)


def test_the_licences_of_this_environment_are_allowed_or_explained() -> None:
    packages = dependencies.runtime_dependencies()
    assert {"torch", "transformers", "huggingface-hub", "safetensors", "typer", "numpy"} <= packages.keys()
    assert not {"pytest", "ruff", "hypothesis", "lvctx"} & packages.keys()
    assert dependencies.refused_licences({n: dependencies.licence_of(p) for n, p in packages.items()}) == []


@pytest.mark.parametrize(
    ("metadata", "licence", "allowed"),
    [
        ("License-Expression: MIT", "MIT", True),
        ("License-Expression: GPL-3.0-only OR MIT", "GPL-3.0-only OR MIT", True),
        ("License-Expression: (MIT OR ISC) AND MIT", "(MIT OR ISC) AND MIT", True),
        ("License-Expression: (MIT OR GPL-3.0-only) AND MIT", "(MIT OR GPL-3.0-only) AND MIT", False),
        ("License-Expression: MIT AND GPL-3.0-only", "MIT AND GPL-3.0-only", False),
        ("License: MIT\nClassifier: License :: OSI Approved :: GNU Affero GPL", "GNU Affero GPL", False),
        ("License: BSD License\n  and its text", "BSD License", True),
        ("Classifier: Programming Language :: Python", "not stated", False),
    ],
)
def test_a_licence_is_read_and_judged(tmp_path: Path, metadata: str, licence: str, allowed: bool) -> None:
    found = dependencies.licence_of(package(tmp_path, "x", metadata))
    assert (found, dependencies.is_allowed(found)) == (licence, allowed)
    assert len(dependencies.refused_licences({"x": found})) == (not allowed)


def test_an_explanation_is_of_one_licence() -> None:
    assert dependencies.refused_licences({"tqdm": "MPL-2.0 AND MIT", "nvidia-cublas": "NVIDIA Proprietary"}) == []
    assert dependencies.refused_licences({"tqdm": "GPL-3.0-only"}) == ["tqdm: GPL-3.0-only"]


def test_vulnerabilities_are_findings_unless_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report in pip-audit's format."""
    found = {"id": "PYSEC-2020-1", "aliases": ["GHSA-1"], "fix_versions": ["2.0", "1.9.1"], "description": ""}
    report = [
        {"name": "a", "version": "1.0", "vulns": [found]},
        {"name": "b", "version": "1.0", "vulns": []},
        {"name": "c", "skip_reason": "Dependency not found on PyPI"},
    ]
    skipped = ["Dependency not found on PyPI"]
    assert dependencies.judge(report) == (["a 1.0: PYSEC-2020-1, fixed in 2.0, 1.9.1"], skipped)
    monkeypatch.setattr(dependencies, "EXPLAINED_VULNERABILITIES", {"GHSA-1": "lvctx never calls it"})
    assert dependencies.judge(report) == ([], skipped)


class Answer(BaseHTTPRequestHandler):
    """The path is the answer's body."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(json.dumps({self.path[1:]: []}).encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answer) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_without_advisories_nothing_is_audited(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dependencies.unreachable(f"{server}/vulnerabilities") == ""
    for url in (f"{server}/other", f"{server}/missing", "http://127.0.0.1:9/"):
        assert dependencies.unreachable(url)
    monkeypatch.setattr(dependencies.subprocess, "run", lambda *given, **options: pytest.fail("pip-audit ran"))
    monkeypatch.setattr(dependencies.unreachable, "__defaults__", (f"{server}/other",))
    findings, (reason,) = dependencies.audit({})
    assert findings == []
    assert "no advisories" in reason
