"""align on packed chat: loss and gradients of a long row are the stock model's, on one rank and on two."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from safetensors.torch import load_file
from support.aligning import talk, write
from test_niah import run
from test_qwen_niah import fails
from torch.nn import functional as F
from transformers import CLIPVisionModel

from lvctx.artifacts.manifest import read_manifest
from lvctx.data.packed_chat import ChatRows
from lvctx.device import CpKind
from lvctx.models.image_processing import Preprocess
from lvctx.models.loading import load_model, load_tokenizer
from lvctx.models.unires import unires_tiles
from lvctx.models.vlm_assembly import assemble, embed_frames, frame_features, newline_id, save_vlm
from lvctx.parallel.context import ParallelContext, joined, make_context
from lvctx.training.batching import Forward, answer_loss
from lvctx.training.packed_align import packed_sample
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.image_tiling import ImageEncoding

pytestmark = pytest.mark.nano
IMAGE_TILES = VIDEO_FRAMES = 2
"""Equal, so that one stock forward takes both as videos."""


@pytest.fixture(scope="module")
def here(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UniRes model, an image of two tiles, a clip of two frames, and samples packed to one row and with hybrid
    resolution."""
    here = tmp_path_factory.mktemp("align-packed")
    tokenizer, tower = load_tokenizer(tiny_lm), CLIPVisionModel.from_pretrained(tiny_tower).eval()
    model = assemble(load_model(tiny_lm), tower, tokenizer, where=tiny_lm, seed=0)
    ImageEncoding.of(model.config.vision_config, grid="unires", rule="code").write_to(model.config)
    save_vlm(model, tokenizer, tiny_tower, here / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)).save(here / "a.png")
    with av.open(str(here / "b.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(VIDEO_FRAMES):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    samples = [
        talk("Hello.", "Good day to you."),
        talk("<image>\nWhat?", "Dots.", image="a.png"),
        talk("<video>\nAnd <image>?", "More, and dots.", video="b.mp4", image="a.png"),
    ]
    write(here / "chat.jsonl", samples, lines=True)
    pack(here, here / "chat")
    pack(here, here / "hybrid", "--hybrid", "2,4,4")
    return here


def pack(here: Path, out: Path, *flags: object, model: Path | None = None, length: int = 160) -> None:
    given = ("--interleaved", here / "chat.jsonl", "--media", here, "--long-share", "any", "--target-length", length)
    done = run("pack-chat", "--model", model or here / "model", *given, *flags, "-o", out)
    assert done.exit_code == 0, done.stderr


def forward_of(here: Path, world: ParallelContext) -> Forward:
    model = load_model(here / "model", dtype=torch.float32)
    return Forward(
        model,
        encoding=ImageEncoding.from_config(model.config),
        preprocess=Preprocess.from_directory(here / "model"),
        newline=newline_id(load_tokenizer(here / "model")),
        tower_grad=True,
        device="cpu",
        ring=world.ring,
        recompute=True,
    )


def gradients(forward: Forward, here: Path) -> tuple[float, int, dict[str, torch.Tensor]]:
    total, count = forward([packed_sample(0, ChatRows(here / "chat"), here)], answer_loss)
    total.backward()
    named = forward.vlm.named_parameters()
    return total.item(), count, {name: p.grad for name, p in named if p.grad is not None}


def is_close(gradient: torch.Tensor, truth: torch.Tensor) -> bool:
    """Up to rounding; the gradient of a bias of keys is 0, since all keys of a query change alike."""
    return float((gradient - truth).norm()) <= 1e-4 * float(truth.norm()) + 1e-8


def pictures(here: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """The image's tiles, and the video's frames as squares."""
    frames = read_video(here / "b.mp4", VideoSampling(fps=2))
    squares = [Preprocess.from_directory(here / "model").square(Image.fromarray(f.image), "crop") for f in frames]
    return unires_tiles(Image.open(here / "a.png"), tile=48, rule="code", max_grids=49), squares


def test_loss_and_gradients_are_the_stock_models(here: Path) -> None:
    """A stock forward of the whole row, its image and its video given as videos of two frames each."""
    rows = ChatRows(here / "chat")
    assert (len(rows), len(rows.samples(0))) == (1, 3)
    tiles, frames = pictures(here)
    assert (len(tiles), len(frames)) == (IMAGE_TILES, VIDEO_FRAMES)
    paths = [item["path"] for sample in rows.samples(0) for item in sample["media"]]
    assert sorted(paths) == ["a.png", "a.png", "b.mp4"]
    preprocess = Preprocess.from_directory(here / "model")
    pixels = torch.stack([preprocess(tiles if path == "a.png" else frames) for path in paths])
    stock = load_model(here / "model", dtype=torch.float32)
    ids, labels = (torch.from_numpy(part(0).astype("int64")) for part in (rows.row, rows.labels))
    logits = stock(input_ids=ids[None], pixel_values_videos=pixels).logits[0]
    expected = F.cross_entropy(logits.double(), labels, reduction="sum")
    expected.backward()
    truth = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    # Here the newline after a block is the language model's own embedding.
    newline = newline_id(load_tokenizer(here / "model"))
    truth["model.language_model.embed_tokens.weight"][newline] += truth.pop("model.image_newline")
    loss, count, found = gradients(forward_of(here, ParallelContext(device="cpu")), here)
    assert count == int((labels >= 0).sum()) > 10
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.keys() == truth.keys()
    assert any("vision_tower" in name for name in found)
    for name, gradient in found.items():
        assert is_close(gradient, truth[name]), name


def _compare(rank: int, here: Path, size: int) -> None:
    torch.set_num_threads(1)
    with joined(here / f"store-{size}", rank=rank, size=size):
        expected, counted, truth = gradients(forward_of(here, ParallelContext(device="cpu")), here)
        for cp_kind in get_args(CpKind):
            world = make_context(device="cpu", cp=size, cp_kind=cp_kind)
            part, count, found = gradients(forward_of(here, world), here)
            loss, total = world.sum([part, count])
            assert abs(part) < abs(expected)
            assert (loss, total) == (pytest.approx(expected, rel=1e-5), counted)
            assert truth.keys() == found.keys()
            for name, gradient in found.items():
                world.add_up(gradient)
                assert is_close(gradient, truth[name]), name


@pytest.mark.slow
def test_two_ranks_share_a_row_exactly(here: Path) -> None:
    multiprocessing.spawn(_compare, args=(here, 2), nprocs=2)


def test_frames_of_hybrid_resolution_have_the_tokens_that_were_packed(here: Path) -> None:
    """Of two frames the second has one token: the mean of its projected features."""
    sample = packed_sample(0, ChatRows(here / "hybrid"), here)
    forward = forward_of(here, ParallelContext(device="cpu"))
    with torch.no_grad():
        blocks = forward.blocks(sample)
        features = frame_features(forward.vlm, forward.preprocess(pictures(here)[1]))
        projected = forward.vlm.model.multi_modal_projector(features)
    video = blocks[[file.kind for file in sample.files].index("video")]
    assert len(video) == 4 + 1 + 1
    torch.testing.assert_close(video[:4], embed_frames(forward.vlm, features[:1]))
    torch.testing.assert_close(video[4], projected[1].mean(0))


def align(here: Path, data: Path, out: Path, *flags: object, model: Path | None = None) -> Any:
    return run("align", "--init", model or here / "model", "--data", data, "--images", here, *flags, "-o", out)


def test_rows_train_from_the_command_line(here: Path, tmp_path: Path) -> None:
    """LoRA and projector train, the tower does not; a dry run says what the rows hold."""
    flags = ("--stage", "full", "--tower-lr", 0, "--lora", 4, "--lr", 1e-2, "--warmup", 0, "--device", "cpu")
    done = align(here, here / "chat", tmp_path / "x", *flags, "--dry-run")
    row = json.loads(done.stdout)
    rows = ChatRows(here / "chat")
    assert {name: row[name] for name in ("rows", "samples", "kinds", "images", "videos", "batch", "steps")} == {
        **{"rows": 1, "samples": 3, "kinds": {"interleaved": 3}, "images": 2, "videos": 1, "batch": 1, "steps": 1}
    }
    assert row["tokens"] == row["longest_sample"] == row["max_length"] == len(rows.row(0))
    # Two tiles or frames of four tokens and a newline, three times.
    assert (row["visual_tokens"], row["counted_tokens"]) == (27, int((rows.labels(0) >= 0).sum()))
    done = align(here, here / "chat", tmp_path / "out", *flags)
    assert done.exit_code == 0, done.stderr
    before, after = (load_file(path / "model.safetensors") for path in (here / "model", tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {part for part in ("vision_tower", "projector", "self_attn", "mlp") for name in changed if part in name}
    assert parts == {"projector", "self_attn"}
    assert read_manifest(tmp_path / "out")["longest_sample"] == len(rows.row(0))


@pytest.mark.parametrize(
    ("code", "flags"),
    [
        (2, ("--fps", 1)),
        (2, ("--template", "plain")),
        (2, ("--max-length", 64)),
        (2, ("--pose",)),
        (2, ("--stage", "dpo")),
    ],
)
def test_what_packing_has_decided_is_refused(here: Path, tmp_path: Path, code: int, flags: tuple[object, ...]) -> None:
    fails(code, align(here, here / "chat", tmp_path / "x", *flags), "packed")


def test_rows_of_another_model_are_refused(here: Path, tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    """Another image encoding, another tokenizer, missing media, and a model with too few positions."""
    other = shutil.copytree(here / "model", tmp_path / "encoding")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"image_grid_rule": "paper", "image_max_grids": 1}))
    fails(3, align(here, here / "chat", tmp_path / "x", model=other), "image encoding")
    tokens = shutil.copytree(here / "model", tmp_path / "tokens")
    content = json.loads((tokens / "tokenizer.json").read_text())
    (tokens / "tokenizer.json").write_text(json.dumps(content, indent=1))
    fails(3, align(here, here / "chat", tmp_path / "x", model=tokens), "another tokenizer")
    short = shutil.copytree(here / "model", tmp_path / "short")
    config["text_config"]["max_position_embeddings"] = 32
    (short / "config.json").write_text(json.dumps(config))
    fails(3, align(here, here / "chat", tmp_path / "x", model=short), "extend-lm")
    done = run(
        *("align", "--init", here / "model", "--data", here / "chat", "--images", tmp_path, "-o", tmp_path / "x")
    )
    fails(3, done, "no such")
    flags = ("--data", here / "chat", "--images", here, "-o", tmp_path / "x")
    fails(2, run("align", "--lm", tiny_lm, "--tower", tiny_tower, *flags), "--init")


def test_an_image_that_has_changed_is_refused(here: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.mp4"):
        shutil.copy(here / name, tmp_path)
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    flags = ("align", "--init", here / "model", "--data", here / "chat", "--images", tmp_path, "--device", "cpu")
    fails(3, run(*flags, "-o", tmp_path / "x"), "has changed")
