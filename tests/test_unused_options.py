"""An option without effect on a model, or with --endpoint, is an error: one table for every family and every option."""

from dataclasses import fields
from pathlib import Path

import pytest
from support import generic_models, mrope_models
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.open_engine import unused_options
from lvctx.vlm.registry import open_vlm

WORKS = {
    #                 llava_onevision, qwen2_vl, llava (generic), gemma3 (by its own forward), --endpoint
    "device": (True, True, True, True, False),
    "dtype": (True, True, True, True, False),
    "device_map": (True, True, True, True, False),
    "cp": (True, True, True, False, False),
    "prefill_chunk": (True, True, True, False, False),
    "reuse": (True, True, True, False, False),
    "kv_cache": (True, True, True, False, False),
    "feature_cache": (True, False, False, False, False),
    "batch": (True, True, True, False, False),
}
KINDS = ("llava_onevision", "qwen2_vl", "llava", "gemma3", "endpoint")
VALUES = {
    "device": ("--device", "cpu"),
    "dtype": ("--dtype", "float32"),
    "device_map": ("--device-map", "auto"),
    "cp": ("--cp", "1"),
    "prefill_chunk": ("--prefill-chunk", "64"),
    "reuse": ("--no-reuse",),
    "kv_cache": ("--kv-cache", "host"),
    "feature_cache": ("--feature-cache", "features"),
    "batch": ("--batch", "2"),
}
LACKING = {"vqa": ("kv_cache",), "videomme": ("kv_cache",), "bench": ("kv_cache",), "niah": ("device_map", "batch")}
"""Options that a command does not have."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {kind: generic_models.save(kind, folder / kind) for kind in ("llava", "gemma3")}
    return {**made, "qwen2_vl": mrope_models.save("qwen2_vl", folder / "qwen2_vl")}


def commands(model: object, folder: Path) -> dict[str, tuple[object, ...]]:
    """Commands on videos, each with a model and inputs that do not exist."""
    asked = ("--videos", folder, "--questions", folder / "q.json", "-o", folder / "out")
    return {
        "vqa": ("vqa", folder / "x.mp4", "--model", model, "--ask", "?"),
        "videomme": ("videomme", "run", "--model", model, *asked),
        "bench": ("bench", "mlvu", "run", "--model", model, *asked),
        "niah": ("niah", "video", "--model", model, "--haystack", folder / "x.mp4", "--lengths", "2", *asked[-2:]),
    }


def refused(flags: tuple[object, ...]) -> str:
    done = CliRunner().invoke(app, list(map(str, flags)), catch_exceptions=False)
    assert done.exit_code == 2, done.output
    assert (len(done.stderr.splitlines()), done.stdout) == (1, "")
    return done.stderr


def test_the_table_has_every_option() -> None:
    assert set(WORKS) == {field.name for field in fields(EngineConfig)} | {"kv_cache"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llava_onevision"])
def test_what_has_no_effect_is_refused_by_every_command(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    server = ("--endpoint", "http://127.0.0.1:9") if kind == "endpoint" else ()
    useless = [name for name, works in WORKS.items() if not works[KINDS.index(kind)]]
    if not server:
        assert sorted(unused_options(open_vlm(models[kind]))) == sorted(useless)
    for command, flags in commands(models.get(kind, "m"), tmp_path).items():
        given = [name for name in useless if name not in LACKING[command]]
        line = refused((*flags, *server, *(part for name in given for part in VALUES[name])))
        for name in given:
            assert f"--{name.replace('_', '-')}" in line, (command, name)


@pytest.mark.nano
def test_all_options_have_an_effect_on_our_own_models(tiny_vlm: Path) -> None:
    assert unused_options(open_vlm(tiny_vlm), device_map=True) == []


def test_a_device_map_places_what_a_device_would(models: dict[str, Path], tmp_path: Path) -> None:
    flags = (*commands(models["qwen2_vl"], tmp_path)["vqa"], "--device-map", "auto", "--device", "cpu")
    assert "--device has no meaning" in refused(flags)


@pytest.mark.parametrize(
    ("send", "flag"),
    [
        ("video", ("--jpeg-quality", "80")),
        ("video", ("--no-frame-times",)),
        ("file-url", ("--jpeg-quality", "80")),
        ("file-url", ("--no-frame-times",)),
        ("file-url", ("--frame-pixels", "1000")),
    ],
)
def test_options_of_images_where_none_are_sent(send: str, flag: tuple[str, ...], tmp_path: Path) -> None:
    server = ("--endpoint", "http://127.0.0.1:9", "--send", send, *flag)
    for command in ("vqa", "videomme", "bench"):
        assert f"--send {send}" in refused((*commands("m", tmp_path)[command], *server))


def test_images_of_a_benchmark_are_no_videos(models: dict[str, Path], tmp_path: Path) -> None:
    flags = list(commands("m", tmp_path)["bench"])
    flags[1] = "vhs"
    assert "--feature-cache" in refused((*flags, "--feature-cache", tmp_path))
    server = ("--endpoint", "http://127.0.0.1:9")
    assert "--send" in refused((*flags, *server, "--send", "video"))
    assert "--frame-times" in refused((*flags, *server, "--no-frame-times"))
