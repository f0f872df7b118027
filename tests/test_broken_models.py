"""Whatever is wrong with a model's files, a command ends in one line and an exit code of the contract."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from support import broken, mrope_models

SEEDS = {"some": range(60), "many": range(60, 1500)}
"""Seeds of the random damage: the first are tried in every run of the tests, the others in the slow tests."""


@pytest.fixture(scope="module")
def models(tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    lm = broken.save_lm(out / "lm")
    found = {"lm": lm, "tower": tiny_tower, "vlm": broken.save_vlm(lm, tiny_tower, out / "vlm")}
    return found | {kind: mrope_models.save(kind, out / kind) for kind in ("qwen2_vl", "qwen2_5_vl")}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            picture = np.full((48, 64, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def commands(kind: str, model: Path, video: Path, frames: Path, text: Path, out: Path) -> Iterator[list[object]]:
    """Every command that loads this kind of model."""
    yield ["info", model, "--json"]
    if kind == "tower":
        yield ["encode-video", video, "--model", model, "--frames", 4, "-q", "-o", out]
        return
    yield ["plan", "extend-lm", "--model", model, "--seq-len", 1024, "--device", "h200", "-q"]
    extend = ["extend-lm", "--model", model, "--steps", 0, "-q", "-o", out]
    yield [*extend, "--rope-theta", 1e6]
    yield [*extend, "--rope", "none", "--context", 4096]
    yield [*extend, "--rope", "yarn", "--factor", 4, "--dry-run"]
    yield [
        *("niah", "text", "--model", model, "--haystack", text, "--lengths", 300, "--depths", 0.5),
        *("--trials", 1, "-q", "-o", out),
    ]
    yield ["export", model, "--to", "hf", "-q", "-o", out]
    yield ["export", model, "--to", "llava", "-q", "-o", out]
    if kind == "vlm":
        yield ["encode-video", video, "--model", model, "--frames", 4, "-q", "-o", out]
        yield ["vqa", frames, "--model", model, "--ask", "What?", "--max-new-tokens", 2]
    if kind.startswith("qwen"):
        yield ["mrope-extend", "--model", model, "--scale", 2, "--original-length", 32768, "-q", "-o", out]
        yield ["vqa", video, "--model", model, "--fps", 1, "--hybrid", "1,8,1", "--ask", "What?", "--max-new-tokens", 2]


@pytest.mark.parametrize("seeds", ["some", pytest.param("many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_damaged_models_end_in_one_line(models: dict[str, Path], video: Path, tmp_path: Path, seeds: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    made = tmp_path / "frames"
    assert broken.lvctx("encode-video", video, "--model", models["vlm"], "--frames", 4, "-q", "-o", made)[0] == 0
    frames = next(made.glob("*.safetensors"))
    failed = []
    for seed in SEEDS[seeds]:
        rng = Random(seed)
        kind = rng.choice(sorted(models))
        model = broken.clone(models[kind], tmp_path / "model")
        file = broken.damage(model, rng)
        for command in commands(kind, model, video, frames, text, tmp_path / "out"):
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            code, said, exception = broken.lvctx(*command)
            case = f"seed {seed}: {kind}, {file}: {command[0]}: {exception!r}"
            if code not in (0, 2, 3, 4, 5) or (code not in (0, 4) and not said):
                failed.append(case)
    assert not failed, "\n".join(failed)
