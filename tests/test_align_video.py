"""Videos in the full and DPO stages: frames as a stock video, folders and files, LLaVA-Hound's rows as released."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Nano
from PIL import Image
from support import aligning
from transformers import CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lvctx.artifacts.manifest import read_manifest
from lvctx.cost import CostMeter
from lvctx.data.conversations import MediaFile, read_conversations, read_pairs
from lvctx.data.row_media import Media
from lvctx.errors import InputError, UsageError
from lvctx.models.loading import load_model, load_tokenizer
from lvctx.models.vlm_assembly import assemble, embed_frames, newline_embedding, newline_id, save_vlm
from lvctx.training.align_config import AlignConfig
from lvctx.training.align_job import resolve_align
from lvctx.training.batching import Forward, Sample, encode_sample
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.image_tiling import ImageEncoding
from lvctx.vlm.video_encoder import VideoEncoder

pytestmark = pytest.mark.nano
FRAMES = 13
HOUND = {"id": "v_a-1", "video": "v_a", "answer": "It is noise.", "chosen": "noise", "rejected": "a cat"}


@pytest.fixture(scope="module")
def vlm(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vlm") / "vlm"
    tokenizer, tower = load_tokenizer(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower).eval()
    model = assemble(load_model(tiny_lm), tower, tokenizer, where=tiny_lm, seed=0)
    ImageEncoding.of(model.config.vision_config, grid="unires", rule="code").write_to(model.config)
    save_vlm(model, tokenizer, tiny_tower, out)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Frames of noise in v_a/, named so that their order is that of their names; and four images."""
    aligning.draw(tmp_path)
    (tmp_path / "v_a").mkdir()
    rng = np.random.default_rng(1)
    for i in range(FRAMES):
        frame = Image.fromarray(rng.integers(0, 255, (40, 64, 3), dtype=np.uint8))
        frame.save(tmp_path / "v_a" / f"c01_{i:04d}.png")
    (tmp_path / "v_a" / "notes.txt").write_text("no frame")
    return tmp_path


def forward_of(vlm: Path, sampling: VideoSampling) -> tuple[Forward, Any]:
    model, tokenizer = load_model(vlm), load_tokenizer(vlm)
    from lvctx.models.image_processing import Preprocess

    forward = Forward(
        model,
        encoding=ImageEncoding.from_config(model.config),
        preprocess=Preprocess.from_directory(vlm),
        newline=newline_id(tokenizer),
        tower_grad=False,
        device="cpu",
        sampling=sampling,
    )
    return forward, tokenizer


@pytest.mark.parametrize(("frames", "numbers"), [(5, [0, 3, 6, 9, 12]), (99, list(range(FRAMES)))])
def test_a_folder_of_frames_is_a_stock_video(vlm: Path, folder: Path, frames: int, numbers: list[int]) -> None:
    """linspace over the frames, CLIP's own processor, stock `get_video_features` with its newline; image beside it."""
    sampling = VideoSampling(frames=frames)
    forward, tokenizer = forward_of(vlm, sampling)
    row = aligning.talk("<image>\n<video>\nWhat?", "noise", image="1.png", video="v_a")
    rows = read_conversations(aligning.write(folder / "d.json", [row]), folder, videos=True)
    sample = encode_sample(0, tuple(rows), tokenizer, forward.encoding, max_length=999, sampling=sampling)
    files = [folder / "v_a" / f"c01_{i:04d}.png" for i in numbers]
    with torch.no_grad():
        image, video = forward.blocks(sample)
        pixels = torch.stack([clip_pixels(vlm, file) for file in files])
        expected = forward.vlm.model.get_video_features(pixels[None]).pooler_output[0]
    torch.testing.assert_close(video, expected, rtol=1e-5, atol=1e-5)
    assert len(video) == 4 * len(numbers) + 1
    assert sample.sequences[0].ids.count(forward.vlm.config.video_token_id) == len(image) + len(video)


def clip_pixels(vlm: Path, file: Path) -> torch.Tensor:
    side = load_model(vlm).config.vision_config.image_size
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return CLIPImageProcessorPil(**size)(Image.open(file), return_tensors="pt")["pixel_values"][0]


def test_a_video_file_is_encoded_as_at_inference(vlm: Path, nano: Nano) -> None:
    sampling = VideoSampling(frames=3)
    forward, _ = forward_of(vlm, sampling)
    path = nano.clips / "bikes.mp4"
    cache = VideoEncoder.open(str(vlm), sampling, device="cpu").read(path, CostMeter())
    with torch.no_grad():
        (block,) = forward.blocks(Sample(number=0, where="here", files=(MediaFile("video", path),), sequences=()))
        expected = torch.cat([embed_frames(forward.vlm, cache.features), newline_embedding(forward.vlm)])
    assert len(block) == 3 * 4 + 1
    torch.testing.assert_close(block, expected, rtol=0.02, atol=0.02)  # the cache is in bfloat16


@pytest.mark.parametrize(
    "prompt", ["What is it?", "<video>\nWhat is it?", "What is it?\n<image>", "<image>\nWhat is it?"]
)
def test_rows_of_llava_hound_are_read_as_released(folder: Path, prompt: str) -> None:
    """Its code removes the mark wherever it is, and writes one before the prompt."""
    data = aligning.write(folder / "p.jsonl", [{**HOUND, "prompt": prompt}], lines=True)
    ((chosen, rejected),) = read_pairs(data, folder)
    assert [turn.content for turn in chosen.turns] == [(Media("video", "v_a"), "What is it?"), ("noise",)]
    assert rejected.turns[1].content == ("a cat",)
    assert chosen.files == (MediaFile("video", folder / "v_a"),)


def test_preferences_about_videos_train(vlm: Path, folder: Path) -> None:
    """The tower too, at a rate of its own; other frames are another run."""
    data = aligning.write(folder / "p.json", [{**HOUND, "prompt": "What is it?"}])
    options: dict[str, Any] = {"stage": "dpo", "init": str(vlm), "lr": 1e-3, "tower_lr": 1e-3, "steps": 1, "batch": 1}
    job = aligning.align(data, folder / "out", None, None, frames=3, **options)
    assert read_manifest(folder / "out")["config"]["frames"] == 3
    assert job.sampling == VideoSampling(frames=3)
    before, after = load_model(vlm), load_model(folder / "out")
    towers = [next(model.model.vision_tower.parameters()) for model in (before, after)]
    assert not torch.equal(*towers)


def test_what_cannot_be_is_one_line(vlm: Path, folder: Path) -> None:
    data = aligning.write(folder / "d.json", [aligning.talk("<video>\nWhat?", "noise", video="v_a")])
    options: dict[str, Any] = {"data": data, "images": folder, "out": folder / "x", "init": str(vlm)}
    assert resolve_align(AlignConfig(**options, stage="full")).config.frames == 10, "LongVA-DPO's"
    with pytest.raises(InputError):
        resolve_align(AlignConfig(**options, stage="projector"))
    with pytest.raises(UsageError):
        resolve_align(AlignConfig(**options, stage="full", frames=3, fps=1.0))
    job = resolve_align(AlignConfig(**options, stage="full", fps=1.0))
    with pytest.raises(InputError):  # a folder of frames has no rate
        job.sample(0, load_tokenizer(vlm), ImageEncoding.from_config(load_model(vlm).config))
    aligning.write(data, [aligning.talk("<image>\nWhat?", "noise", image="0.png")])
    with pytest.raises(UsageError):
        resolve_align(AlignConfig(**options, stage="full", frames=3))
    aligning.write(data, [aligning.talk("<video>\nWhat?", "noise", video="v_b")])
    with pytest.raises(InputError) as caught:
        resolve_align(AlignConfig(**options, stage="full"))
    assert caught.value.where == f"{data}[0]"
