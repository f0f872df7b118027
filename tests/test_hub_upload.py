"""`export --push-to-hub` against a server that answers as the hub does: what is sent, where the token is, refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.hub_server import HubServer, serve_hub
from support.refusals import refused
from test_longva import lvctx
from typer.testing import CliRunner

from lvctx.artifacts.manifest import listed_files
from lvctx.cli.app import app
from lvctx.errors import InputError
from lvctx.models.hub_upload import upload_model

TOKEN = "hf_secretsecretsecretsecret"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that this process talks to, with a login."""
    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "cached"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def push(model: Path, out: Path, repository: str = "org/m") -> tuple[int, list[dict[str, Any]], str]:
    return lvctx("export", model, "--to", "hf", "-o", out, "--push-to-hub", repository, "-q")


def test_the_files_of_the_manifest_are_one_commit_and_the_token_is_a_header(
    hub: HubServer, tiny_lm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["export", str(tiny_lm), "--to", "hf", "-o", str(out), "--push-to-hub", "org/m", "-v"]
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/org/m"
    (commit,) = hub.commits
    assert commit == {name: (out / name).read_bytes() for name in listed_files(out)}
    assert {"README.md", "config.json", "model.safetensors"} <= commit.keys()
    called = ["repos/create", "validate-yaml", "models/org/m/preupload/main", "models/org/m/commit/main"]
    assert [path for method, path, _, _ in hub.seen if method == "POST"] == [f"/api/{name}" for name in called]
    for method, path, headers, body in hub.seen:
        sent = {name.lower(): value for name, value in headers.items()}
        assert sent.pop("authorization", None) == (f"Bearer {TOKEN}" if method == "POST" else None)
        assert TOKEN not in f"{path}{sent}{body!r}"
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in out.iterdir() if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("word", "status"), [("create", 401), ("create", 403), ("create", 500), ("preupload", 403), ("commit", 409)]
)
def test_a_refusal_is_one_line_without_the_token(
    hub: HubServer, tiny_lm: Path, tmp_path: Path, word: str, status: int
) -> None:
    """The server repeats the token in its message, which is not the hub's habit."""
    hub.refuse[word] = status
    code, rows, said = push(tiny_lm, tmp_path / "out")
    assert (code, rows, hub.commits) == (3, [], [])
    assert said.startswith("lvctx: org/m: ")
    assert str(status) in said
    assert TOKEN not in said


def test_without_login_network_or_an_id_nothing_is_written(
    hub: HubServer, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("m", "a/b/c", "org/..", "org/m m"):
        assert push(tiny_lm, tmp_path / "out", wrong)[0] == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(tiny_lm, tmp_path / "out")[0] == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(tiny_lm, tmp_path / "out")[0] == 5
    assert (hub.seen, (tmp_path / "out").exists()) == ([], False)


def test_neither_damaged_files_nor_others_are_uploaded(hub: HubServer, tiny_lm: Path, tmp_path: Path) -> None:
    """And a dry run sends nothing."""
    out = tmp_path / "out"
    assert lvctx("export", tiny_lm, "--to", "hf", "-o", out, "--push-to-hub", "org/m", "--dry-run")[0] == 0
    assert hub.seen == []
    assert push(tiny_lm, out)[0] == 0
    (out / "notes.txt").write_text("for the author alone")
    assert upload_model(out, "org/m")["uploaded"] == len(hub.commits[1])
    assert hub.commits[1].keys() == hub.commits[0].keys() == listed_files(out).keys()
    (out / "config.json").unlink()  # a link to the model's own
    (out / "config.json").write_text("{}")
    with refused(InputError, "out/config.json"):
        upload_model(out, "org/m")
    assert len(hub.commits) == 2
