"""Training Qwen-VL on packed chat: the loss is the stock model's, ranks share rows exactly, only the LM changes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file
from safetensors.torch import load_file
from support import mrope_models
from support.aligning import metrics
from support.forks import start_ranks
from support.mrope_models import opinionated
from test_compiled_layers import has_compiler
from test_niah import run
from test_qwen_niah import fails
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from lvctx.artifacts.manifest import read_manifest
from lvctx.data.packed_chat import ChatRows
from lvctx.device import CpKind
from lvctx.errors import InputError
from lvctx.models.loading import load_config, load_model
from lvctx.parallel import hf_attention
from lvctx.parallel.context import ParallelContext, joined, make_context
from lvctx.rope.mrope_positions import Grids, SequencePart, Text, positions
from lvctx.training.chat_rows import ChatRow, RowReader
from lvctx.training.mrope_config import MropeConfig
from lvctx.training.mrope_extend import ChatLoss, resolve_mrope_training, shard_chat
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.run_training import run_training
from lvctx.video.hybrid import Hybrid
from lvctx.video.reader import read_video
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.qwen_frames import pixels, resize_frames
from lvctx.vlm.registry import open_vlm


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a picture, a clip of five frames, three samples, and the samples packed to rows."""
    here = tmp_path_factory.mktemp("mrope-train")
    mrope_models.save("qwen2_5_vl", here / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 110, 3), dtype=np.uint8)).save(here / "a.png")
    with av.open(str(here / "b.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(5):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    def asked(question: str, answer: str, **media: str) -> dict[str, Any]:
        return {**media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    samples = [
        asked("Hello.", "Good day to you."),
        asked("<image>What?", "Dots.", image="a.png"),
        asked("<video>And?", "More.", video="b.mp4"),
    ]
    (here / "chat.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    flags = ("--model", here / "model", "--interleaved", here / "chat.jsonl", "--media", here, "--long-share", "any")
    done = run("pack-chat", *flags, "--hybrid", "2,16,4", "--target-length", 400, "-o", here / "chat")
    assert done.exit_code == 0, done.stderr
    return here


def reader_of(here: Path) -> RowReader:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rule = open_vlm(here / "model").token_rule(VideoSampling(hybrid=Hybrid(group=2, tokens=16, ratio=4)))
    processor = Qwen2VLImageProcessorPil.from_pretrained(here / "model")
    return RowReader(ChatRows(here / "chat"), here, rule, processor, tokens_per_second=2)


def test_the_loss_is_the_stock_models(here: Path) -> None:
    """Positions from the media in their order, pixels as `vqa` sizes them; cross-entropy on stock logits."""
    reader = reader_of(here)
    assert len(reader.rows) == 1
    row, ids = reader.read(0), reader.rows.row(0).astype(np.int64)
    seen: dict[str, torch.Tensor] = {}
    parts: list[SequencePart] = []
    at = 0
    for item in (item for sample in reader.rows.samples(0) for item in sample["media"]):
        begin = item["blocks"][0][0]
        if item["kind"] == "image":
            stock = reader.processor(images=[Image.open(here / "a.png")], return_tensors="pt")
            seen |= {"pixel_values": stock["pixel_values"], "image_grid_thw": stock["image_grid_thw"]}
            _, down, across = (int(n) for n in stock["image_grid_thw"][0])
            parts += [Text(begin - at), Grids(1, down // 2, across // 2)]
            at = begin + down * across // 4
        else:
            shots = [(frame.pts, frame.image) for frame in read_video(here / "b.mp4", VideoSampling(fps=2))]
            sampled = resize_frames(shots, reader.rule, resample=reader.processor.resample)
            seen |= pixels(sampled, reader.processor)
            parts += [Text(begin - at), sampled.part(2)]
            at = begin + sum(block.tokens for block in sampled.blocks) + 2 * (len(sampled.blocks) - 1)
    found, _ = positions([*parts, Text(len(ids) - at)])
    assert torch.equal(row.positions_3L, found)
    model = opinionated("qwen2_5_vl")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None], position_ids=found[:, None], **seen).logits[0]
        expected = F.cross_entropy(logits.double(), row.labels_L, reduction="sum")
        total, count = ChatLoss(model, ParallelContext(device="cpu").ring)(
            **shard_chat(row, ParallelContext(device="cpu"))
        )
    assert count == int((row.labels_L >= 0).sum()) > 20
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def gradients(vlm: Any, row: ChatRow, world: ParallelContext) -> tuple[float, dict[str, torch.Tensor]]:
    vlm.zero_grad(set_to_none=True)
    total, _ = ChatLoss(vlm, world.ring)(**shard_chat(row, world))
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def third(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples packed for Qwen3-VL, at the default resolution."""
    third = tmp_path_factory.mktemp("qwen3-train")
    mrope_models.save("qwen3_vl", third / "model")
    for name in ("a.png", "b.mp4", "chat.jsonl"):
        shutil.copy(here / name, third)
    flags = ("--model", third / "model", "--interleaved", third / "chat.jsonl", "--media", third, "--long-share", "any")
    done = run("pack-chat", *flags, "--target-length", 600, "-o", third / "chat")
    assert done.exit_code == 0, done.stderr
    return third


def reader_of_third(third: Path) -> RowReader:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    rule = open_vlm(third / "model").token_rule(VideoSampling())
    processor = Qwen2VLImageProcessorPil.from_pretrained(third / "model")
    return RowReader(ChatRows(third / "chat"), third, rule, processor, tokens_per_second=None)


def test_qwen3_vl_trains_as_its_stock_forward_does(third: Path) -> None:
    """Times are text, each grid is an item, deeper layers get visual features: loss, positions and all gradients."""
    reader = reader_of_third(third)
    assert len(reader.rows) == 1
    row = reader.read(0)
    tokenizer = mrope_models.tokenizer()
    text = tokenizer.decode(row.ids_L).replace("<|video_pad|>", "")
    # Five frames at 2 per second: two pairs, and the last one merged with itself.
    item = "<|vision_start|><|vision_end|>"
    assert "".join(f"<{time} seconds>{item}" for time in ("0.2", "1.2", "2.0")) in text
    frames = [(frame.pts, frame.image) for frame in read_video(third / "b.mp4", VideoSampling(fps=2))]
    stock = reader.processor(images=[Image.open(third / "a.png")], return_tensors="pt")
    seen = {"pixel_values": stock["pixel_values"], "image_grid_thw": stock["image_grid_thw"]}
    seen |= pixels(resize_frames(frames, reader.rule, resample=reader.processor.resample), reader.processor)
    model = load_model(third / "model", dtype=torch.float32)
    kinds = torch.zeros_like(row.ids_L)
    kinds[row.ids_L == model.config.image_token_id], kinds[row.ids_L == model.config.video_token_id] = 1, 2
    found, _ = model.model.get_rope_index(
        row.ids_L[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=seen["image_grid_thw"],
        video_grid_thw=seen["video_grid_thw"],
    )
    assert torch.equal(row.positions_3L, found[:, 0])
    logits = model(input_ids=row.ids_L[None], mm_token_type_ids=kinds[None], **seen).logits[0]
    expected = F.cross_entropy(logits.double(), row.labels_L, reduction="sum")
    expected.backward()
    truth = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss, ours = gradients(model, row, ParallelContext(device="cpu"))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert ours.keys() == truth.keys()
    assert any("visual.deepstack_merger_list" in name for name in ours)
    for name, gradient in ours.items():
        assert float((gradient - truth[name]).norm()) <= 1e-4 * float(truth[name].norm()), name
    # A row of text: the tower takes part without an effect.
    text_row = replace(row, patches=None, grids_B3=row.grids_B3[:0], ids_L=row.ids_L.masked_fill(kinds > 0, 1))
    _, ours = gradients(model, text_row, ParallelContext(device="cpu"))
    assert ours.keys() == truth.keys()
    assert all(not gradient.any() for name, gradient in ours.items() if "visual" in name)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    ("rates", "parts"),
    [
        (("--lr", 0, "--merger-lr", 1e-2), {"merger"}),
        (("--lr", 1e-2, "--tower-lr", 1e-2), {"lm", "tower"}),
        (("--lr", 1e-2, "--merger-lr", 1e-2, "--tower-lr", 1e-2, "--lora", 0), {"lm", "merger", "tower"}),
    ],
)
def test_parts_with_a_learning_rate_train(
    kind: str, rates: tuple[Any, ...], parts: set[str], here: Path, third: Path, tmp_path: Path
) -> None:
    """Table 2's strategies: the merger and the tower are aligned, or trained with the language model."""
    folder = third if kind == "qwen3_vl" else here
    flags = ("mrope-extend", "--model", folder / "model", "--media", folder, "--data", folder / "chat", "--scale", 2)
    done = run(*flags, "--steps", 1, "--warmup", 0, *rates, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", tmp_path / "out"))
    changed = {
        "lm" if "visual" not in name else "merger" if "merger" in name else "tower"
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert changed == parts
    assert ("adapter/adapter_model.safetensors" in read_manifest(tmp_path / "out")["files"]) == (
        "lm" in parts and "--lora" not in rates
    )
    fails(2, run(*flags, "--lr", 0, "-o", tmp_path / "x"), "nothing trains")


def test_qwen3_vl_trains_from_the_command_line(third: Path, tmp_path: Path) -> None:
    flags = ("mrope-extend", "--model", third / "model", "--media", third, "--data", third / "chat", "--scale", 2)
    done = run(*flags, "--steps", 1, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["config"]["method"], manifest["context"]) == ("yarn", 524_288)
    before, after = (load_file(path / "model.safetensors") for path in (third / "model", tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name and "self_attn" in name for name in changed)
    fails(
        2,
        run(
            "pack-chat",
            "--model",
            third / "model",
            "--video",
            third / "chat.jsonl",
            "--target-length",
            600,
            "--hybrid-mode",
            "image",
            "-o",
            tmp_path / "x",
        ),
        "merges pairs",
    )


def _compare(rank: int, here: Path, third: Path, size: int) -> None:
    torch.set_num_threads(1)
    with joined(here / f"store-{size}", rank=rank, size=size):
        for folder, reader in ((here, reader_of(here)), (third, reader_of_third(third))):
            row = reader.read(0)
            config = load_config(folder / "model")
            config.text_config.num_attention_heads = size
            config.text_config.hidden_size = config.vision_config.out_hidden_size = 128 * size
            torch.manual_seed(0)
            vlm = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
            for part in (vlm.model.language_model, vlm.lm_head):
                part.requires_grad_(True)
            expected, truth = gradients(vlm, row, ParallelContext(device="cpu"))
            assert not any("visual" in name for name in truth)
            for cp_kind in get_args(CpKind):
                world = make_context(device="cpu", cp=size, cp_kind=cp_kind)
                hf_attention.use(vlm.model.language_model, where=folder, ring=world.ring)
                share, found = gradients(vlm, row, world)
                (loss,) = world.sum([share])
                assert abs(share) < abs(expected)
                assert loss == pytest.approx(expected, rel=1e-5)
                assert truth.keys() == found.keys()
                for name, gradient in found.items():
                    world.add_up(gradient)
                    assert float((gradient - truth[name]).norm()) <= 1e-4 * float(truth[name].norm()), name


def test_two_ranks_share_a_row_exactly(here: Path, third: Path) -> None:
    """Loss and every gradient of the language model: positions and deeper features are cut as tokens are."""
    start_ranks(_compare, here, third, 2, ranks=2)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_layers_give_the_losses_of_eager_ones(here: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "batch": 2, "lr": 1e-2, "warmup": 0.0, "lora": 4}
    config = MropeConfig(model=str(here / "model"), out=tmp_path, scale=2, data=here / "chat", media=here, **options)
    job = resolve_mrope_training(config)
    for name in ("eager", "compiled"):
        parallel = ParallelConfig(device="cpu", dtype="float32", compile=name == "compiled")
        run_training(job.task(), parallel, RunControl(out=tmp_path / name))
    eager, compiled = (metrics(tmp_path / name) for name in ("eager", "compiled"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in eager], rel=1e-5)


def test_only_the_language_model_changes_and_a_stopped_run_continues(here: Path, tmp_path: Path) -> None:
    from lvctx.errors import Stopped

    options: dict[str, Any] = {"steps": 2, "batch": 2, "lr": 1e-2, "warmup": 0.0, "lora": 4}
    config = MropeConfig(model=str(here / "model"), out=tmp_path, scale=2, data=here / "chat", media=here, **options)
    job, parallel = resolve_mrope_training(config), ParallelConfig(device="cpu")

    def stop(done: int, total: int, note: str) -> None:
        if done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        run_training(job.task(), parallel, RunControl(out=tmp_path / "parts", on_progress=stop))
    assert not (tmp_path / "parts" / "MANIFEST.json").exists()
    for name in ("parts", "whole"):
        run_training(job.task(), parallel, RunControl(out=tmp_path / name))
    before, whole, parts = (
        load_file(path / "model.safetensors") for path in (here / "model", tmp_path / "whole", tmp_path / "parts")
    )
    assert before.keys() == whole.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    changed = {name for name in whole if not torch.equal(before[name], whole[name])}
    assert changed == {name for name in whole if "self_attn" in name and name.endswith("proj.weight")}
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["text_config"]["rope_parameters"] == job.rope
    manifest = read_manifest(tmp_path / "whole")
    assert manifest["config"]["training"]["lora"] == 4
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "vllm.json"} <= manifest["files"].keys()
    load_model(tmp_path / "whole")
    lora = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    assert len(lora) == 2 * len(changed)
    for name in changed:  # alpha is twice the rank
        of = "base_model.model.model.language_model." + name[name.index("layers.") :].removesuffix("weight")
        added = 2 * lora[of + "lora_B.weight"].float() @ lora[of + "lora_A.weight"].float()
        torch.testing.assert_close(whole[name] - before[name], added, rtol=0.02, atol=1e-4)


def test_rows_of_another_tokenizer_and_ids_without_an_embedding_are_refused(here: Path, tmp_path: Path) -> None:
    config = MropeConfig(model=str(here / "model"), out=tmp_path, scale=2, data=here / "chat", media=here, lr=1e-3)
    other = shutil.copytree(here / "model", tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(InputError) as refused:
        resolve_mrope_training(replace(config, model=str(other)))
    assert refused.value.where == here / "chat"
    rows = shutil.copytree(here / "chat", tmp_path / "rows")
    shard = rows / "shard-00000.safetensors"
    with safe_open(shard, "np") as opened:
        metadata = opened.metadata()
    tensors = load_arrays(shard)
    tensors["input_ids"][0] = 1 << 20
    save_file(tensors, shard, metadata)
    with pytest.raises(InputError) as refused:
        resolve_mrope_training(replace(config, data=rows))
    assert refused.value.where == shard


def test_the_command_trains_on_a_file_of_samples(here: Path, tmp_path: Path) -> None:
    flags = ("mrope-extend", "--model", here / "model", "--scale", 2, "--media", here, "--steps", 1)
    done = run(*flags, "--data", here / "chat.jsonl", "--seq-len", 400, "--hybrid", "2,16,4", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert (row["lora"], row["rows"], row["seq_len"]) == (16, 1, 400)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    again = run(*flags, "--data", here / "chat.jsonl", "--seq-len", 400, "--hybrid", "2,16,4", "-o", tmp_path / "out")
    assert again.stdout == done.stdout
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    fails(3, run(*flags, "--data", here / "chat", "--hybrid", "2,16,2", "-o", tmp_path / "x"), "another resolution")
    fails(2, run(*flags, "--data", here / "chat", "--seq-len", 100, "-o", tmp_path / "x"), "cannot be cut to 100")


def test_stages_go_on_from_each_other(here: Path, tmp_path: Path) -> None:
    """By 2, then by 4: what the last writes says 4 times the first model's length, and is not done again."""
    flags = ("mrope-extend", "--model", here / "model", "--media", here, "--data", here / "chat", "--lora", 2)
    flags += ("--scale", 4, "--stage", "scale=2,steps=1", "--stage", "scale=4,steps=1,lr=1e-3", "-o", tmp_path / "out")
    done = run(*flags)
    assert done.exit_code == 0, done.stderr
    assert [stage["lr"] for stage in json.loads(done.stdout)["stages"]] == [1e-4, 1e-3]
    first, last = read_manifest(tmp_path / "out" / "stage-1"), read_manifest(tmp_path / "out")
    assert (first["config"]["factor"], last["config"]["factor"]) == (2, 4)
    assert (first["context"], last["context"], last["original_length"]) == (65_536, 131_072, 32_768)
    assert [stage["factor"] for stage in last["config"]["stages"]] == [2, 4]
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert run(*flags).stdout == done.stdout
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    fails(2, run(*flags[:3], "--scale", 2, "--stage", "steps=1", "-o", tmp_path / "x"), "give --data")


def test_giraffes_recipe_trains_at_64k_and_then_at_128k(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own sections pack the rows of both stages; the lengths, frequencies and tokens a frame are the paper's."""
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[1] / "recipes" / "giraffe-7b.toml"
    (tmp_path / "text.jsonl").write_text((here / "chat.jsonl").read_text().splitlines()[0])
    packing = ("--model", here / "model", "--text", "text.jsonl", "--mix", "text=1", "--long-share", "any")
    for section, out in (("pack-chat", "chat-64k"), ("pack-chat-128k", "chat-128k")):
        done = run("pack-chat", "--recipe", f"{recipe}#{section}", *packing, "-o", out)
        assert done.exit_code == 0, done.stderr
    done = run("mrope-extend", "--recipe", recipe, "--model", here / "model", "--dry-run", "-o", "giraffe")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [stage["seq_len"] for stage in plan["stages"]] == [65_536, 131_072]
    shutil.copytree("chat-64k", "captions-64k")
    done = run(
        "mrope-extend",
        "--recipe",
        f"{recipe}#mrope-extend-aligned",
        "--model",
        here / "model",
        "--dry-run",
        "-o",
        "aligned",
    )
    assert done.exit_code == 0, done.stderr
    rates = [(stage["lr"], stage["merger_lr"], stage["tower_lr"]) for stage in json.loads(done.stdout)["stages"]]
    assert rates == [(0, 1e-4, 2e-6), (1e-4, 0, 0), (1e-4, 0, 0)]
    assert (plan["factor"], plan["original"], plan["context"], plan["ramp"]) == (8, 16_384, 131_072, "wavelength")
    # Table 4: 1,024 frames of 120 tokens on average; sizes are whole patches, so fewer fit into 16:9.
    assert plan["video"]["nominal"] == 1_024 * 120
    assert plan["video"]["actual"] == pytest.approx(1_024 * 120, rel=0.15)
