"""Our outputs in stock transformers, from the files alone: the same pixels, the same answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from support import torchvision_cpu
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.models.card import CARD
from lvctx.video.sampling import VideoSampling

FFMPEG = get_ffmpeg_exe()
SUPPORT = Path(__file__).parent / "support"


@pytest.fixture(scope="module")
def stock_environment() -> dict[str, str]:
    """Variables of a process in which stock video processors work."""
    folder = torchvision_cpu.install()
    if folder is None:
        pytest.skip("no torchvision for this torch can be installed here")
    return {**os.environ, "TORCHVISION": str(folder), "PYTHONPATH": f"{SUPPORT}:{Path(__file__).parents[1]}"}


def chat(environment: dict[str, str], folder: Path, model: Path, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Model inputs and answer of stock code to one turn."""
    request = {"model": str(model), "messages": [{"role": "user", "content": content}]}
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(SUPPORT / "stock_chat.py"), str(folder / "request.json"), str(folder / "out.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "out.npz"))


@pytest.fixture(scope="module")
def short_clip(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 24 frames of a real clip, 640 x 272, without loss."""
    out = tmp_path_factory.mktemp("clip") / "bikes.mp4"
    source = ["-i", str(nano.clips / "bikes.mp4"), "-frames:v", "24", "-an"]
    subprocess.run([FFMPEG, "-v", "error", *source, "-c:v", "libx264", "-qp", "0", str(out)], check=True)
    return out


@pytest.mark.nano
def test_stock_video_is_cropped_and_answered_like_ours(
    stock_environment: dict[str, str], loud_vlm: Path, short_clip: Path, tmp_path: Path
) -> None:
    """`apply_chat_template` on the file itself against encode-video and vqa."""
    from lvctx.models.image_processing import Preprocess
    from lvctx.vlm.video_encoder import VideoEncoder

    ask = "What is on the road?"
    content = [{"type": "video", "path": str(short_clip)}, {"type": "text", "text": ask}]
    stock = chat(stock_environment, tmp_path, loud_vlm, content)
    encoder = VideoEncoder.open(str(loud_vlm), VideoSampling(fps="native"), device="cpu")
    frames = encoder.encode(short_clip, tmp_path / "frames")["path"]
    done = CliRunner().invoke(app, ["vqa", frames, "--model", str(loud_vlm), "--ask", ask, "--max-new-tokens", "5"])
    assert json.loads(done.stdout)["answer"] == str(stock["answer"]).strip() != ""
    preprocess = Preprocess.from_directory(loud_vlm)
    command = [FFMPEG, "-v", "error", "-i", str(short_clip), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    images = [Image.fromarray(frame) for frame in raw.reshape(24, 272, 640, 3)]
    ours = preprocess([preprocess.square(image, "crop") for image in images])
    std = torch.tensor(preprocess.std)[:, None, None]
    levels = (torch.from_numpy(stock["pixel_values_videos"])[0] - ours).abs() * std * 255
    assert levels.max() < 1.5, "Pillow and torchvision round to whole levels in their own ways"
    assert levels.mean() < 0.02


@pytest.mark.nano
def test_a_stock_image_in_a_chat_works(stock_environment: dict[str, str], loud_vlm: Path, tmp_path: Path) -> None:
    Image.new("RGB", (150, 90), (200, 30, 30)).save(tmp_path / "image.png")
    content = [{"type": "image", "path": str(tmp_path / "image.png")}, {"type": "text", "text": "What is it?"}]
    stock = chat(stock_environment, tmp_path, loud_vlm, content)
    assert str(stock["answer"])
    assert "pixel_values" in stock
    assert "pixel_values_videos" not in stock


@pytest.mark.nano
def test_the_cards_lines_give_tiles_as_a_video(
    stock_environment: dict[str, str], loud_vlm: Path, tmp_path: Path
) -> None:
    """Run as the card has them; the model is fed what alignment feeds it."""
    from lvctx.models.image_processing import Preprocess
    from lvctx.models.unires import unires_tiles

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 150, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    (code,) = re.findall(r"```python\n(.*?)```", (loud_vlm / CARD).read_text(), re.DOTALL)
    given = f"model_dir, image_file, question = {str(loud_vlm)!r}, {str(tmp_path / 'image.png')!r}, 'What is it?'\n"
    kept = f"np.savez({str(tmp_path / 'out.npz')!r}, answer=answer, pixels=inputs['pixel_values_videos'].numpy())\n"
    script = f"import torchvision_cpu\ntorchvision_cpu.use()\n{given}{code}\n{kept}"
    done = subprocess.run([sys.executable, "-c", script], env=stock_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stock = np.load(tmp_path / "out.npz")
    ours = Preprocess.from_directory(loud_vlm)(unires_tiles(image, tile=48, rule="code", max_grids=49))
    assert str(stock["answer"])
    assert np.abs(stock["pixels"][0] - ours.numpy()).max() < 1e-5
