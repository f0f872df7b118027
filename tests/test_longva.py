"""LongVA's released format and back: every tensor converted or listed, the same logits, the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support import llava_models
from torch.nn import functional as F
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor
from typer.testing import CliRunner

from lvctx.artifacts.manifest import read_manifest
from lvctx.artifacts.weights import read_weights, write_weight_shard
from lvctx.cli.app import app
from lvctx.errors import UsageError
from lvctx.models.image_processing import Preprocess
from lvctx.models.llava_format import llava_config
from lvctx.models.loading import load_model
from lvctx.models.side_files import write_side_files
from lvctx.models.vlm_assembly import assemble, save_vlm
from lvctx.vlm.anyres import anyres_pinpoints
from lvctx.vlm.image_tiling import ImageEncoding


def lvctx(*args: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows, and our line on stderr."""
    done = CliRunner().invoke(app, [*map(str, args)])
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
    return done.exit_code, [json.loads(line) for line in done.stdout.splitlines()], "".join(said)


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_lm)


@pytest.fixture(scope="module")
def released(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lm, tower, projector = llava_models.parts(tokenizer)
    out = tmp_path_factory.mktemp("released")
    return llava_models.write(out, llava_models.tensors_of(lm, tower, projector), lm, tokenizer)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def llava_logits(released: Path, tokenizer: Any, pixels: torch.Tensor, question: str) -> torch.Tensor:
    """What the released code computes, written out: tower layer -2 without CLS, MLP, 2x2 pool, grids in a row."""
    lm, tower, projector = llava_models.parts(tokenizer)
    text = f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in text.split("<image>"))
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = F.gelu(F.linear(features, projector["0.weight"], projector["0.bias"]))
        hidden = F.linear(hidden, projector["2.weight"], projector["2.bias"])
        maps = hidden.view(len(pixels), 4, 4, -1).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(0, 2)
        embed = lm.get_input_embeddings()
        row = torch.cat([embed(torch.tensor(before)), pooled, embed(torch.tensor(after))])
        return lm(inputs_embeds=row[None]).logits[0]


def stock_logits(model: Path, pixels: torch.Tensor, question: str) -> torch.Tensor:
    vlm = LlavaOnevisionForConditionalGeneration.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = [{"type": "video"}, {"type": "text", "text": question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    text = text[text.index("<|im_start|>user") :]  # this template's system turn is not the point
    ids = tokenizer.encode(text, add_special_tokens=False)
    at = ids.index(vlm.config.video_token_id)
    visual = len(pixels) * 4 + 1
    row = torch.tensor([ids[:at] + [vlm.config.video_token_id] * visual + ids[at + 1 :]])
    with torch.no_grad():
        return vlm(input_ids=row, pixel_values_videos=pixels[None]).logits[0]


def square(n: int) -> list[list[int]]:
    """The released code's sizes in pixels for a tower of 48 px and at most n tiles."""
    return [[48 * w, 48 * h] for w in range(1, n + 1) for h in range(1, n + 1) if 1 < w * h <= n]


@pytest.mark.parametrize(
    ("pinpoints", "grids"),
    [
        ([[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]], ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
        (square(5), 5),
        (square(49), 49),
        (None, 49),
        ("[(48, 96), (96, 48)]", 2),
        ("(1x1),...,(2x2)", ((1, 1), (1, 2), (2, 1), (2, 2))),
    ],
)
def test_an_image_becomes_one_of_the_checkpoints_own_grids(
    tokenizer: Any, tmp_path: Path, pinpoints: Any, grids: Any
) -> None:
    """As transformers' port of the released code chooses among them; and they go back as they came."""
    from transformers import AutoConfig
    from transformers.image_processing_utils import select_best_resolution

    from lvctx.models.unires import unires_grid
    from lvctx.vlm.image_tiling import ImageEncoding

    lm, tower, projector = llava_models.parts(tokenizer)
    tensors = llava_models.tensors_of(lm, tower, projector)
    model = llava_models.write(tmp_path / "llava", tensors, lm, tokenizer, image_grid_pinpoints=pinpoints)
    code, _, said = lvctx("import-longva", model, "-o", tmp_path / "vlm")
    assert code == 0, said
    encoding = ImageEncoding.from_config(AutoConfig.from_pretrained(tmp_path / "vlm"))
    assert encoding.max_grids == grids
    listed = [(48 * w, 48 * h) for w, h in grids] if isinstance(grids, tuple) else [tuple(p) for p in square(grids)]
    for width, height in ((48, 48), (200, 90), (90, 200), (500, 500), (1000, 100)):
        best = select_best_resolution((height, width), [(h, w) for w, h in listed])
        found = unires_grid(width, height, tile=48, max_grids=encoding.max_grids)
        assert (found[1] * 48, found[0] * 48) == best
    assert lvctx("export", tmp_path / "vlm", "--to", "llava", "-o", tmp_path / "back")[0] == 0
    back = json.loads((tmp_path / "back" / "config.json").read_text())["image_grid_pinpoints"]
    assert [tuple(pair) for pair in back] == listed


@pytest.mark.parametrize("pinpoints", [[], "x", [[50, 96]], [[48]], [48], {"a": 1}, [["48", "96"]], 5])
def test_pinpoints_that_are_none_are_refused(tokenizer: Any, tmp_path: Path, pinpoints: Any) -> None:
    lm, tower, projector = llava_models.parts(tokenizer)
    tensors = llava_models.tensors_of(lm, tower, projector)
    model = llava_models.write(tmp_path / "llava", tensors, lm, tokenizer, image_grid_pinpoints=pinpoints)
    code, _, said = lvctx("import-longva", model, "-o", tmp_path / "vlm")
    assert code == 3
    assert "image_grid_pinpoints is" in said


def test_the_resampler_that_the_dpo_script_names_is_not_read(tokenizer: Any, tmp_path: Path) -> None:
    lm, tower, projector = llava_models.parts(tokenizer)
    tensors = llava_models.tensors_of(lm, tower, projector)
    plain = llava_models.write(tmp_path / "plain", tensors, lm, tokenizer)
    named = llava_models.write(tmp_path / "named", tensors, lm, tokenizer, mm_resampler_type="spatial_pool")
    for model in (plain, named):
        code, _, said = lvctx("import-longva", model, "-o", model.with_suffix(".vlm"))
        assert code == 0, said
    ours, other = (all_tensors(tmp_path / name) for name in ("plain.vlm", "named.vlm"))
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    refused = llava_models.write(tmp_path / "other", tensors, lm, tokenizer, mm_resampler_type="perceiver")
    assert lvctx("import-longva", refused, "-o", tmp_path / "no")[0] == 3


def test_logits_are_those_of_the_released_code(released: Path, tokenizer: Any, tmp_path: Path) -> None:
    code, rows, said = lvctx("import-longva", released, "-o", tmp_path / "vlm")
    assert code == 0, said
    assert rows[0]["dropped"] == ["model.image_newline"], "UniRes reads none"
    assert (rows[0]["tower"], rows[0]["context"], rows[0]["tokens_per_frame"]) == ("inside", 512, 4)
    torch.manual_seed(9)
    pixels = torch.randn(5, 3, 48, 48).bfloat16()
    expected = llava_logits(released, tokenizer, pixels, "Why?")
    found = stock_logits(tmp_path / "vlm", pixels, "Why?")
    assert found.shape == expected.shape
    # "\n" is a token of the text there and the end of the block here: the rows are the same. bfloat16 all through.
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
    before, after = all_tensors(released), all_tensors(tmp_path / "vlm")
    assert torch.equal(after["language_model.model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(after["image_newline"], before["model.embed_tokens.weight"][tokenizer.encode("\n")[0]])
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 1e9
    assert config["dtype"] == "bfloat16"
    processor = LlavaOnevisionImageProcessor.from_pretrained(tmp_path / "vlm")
    assert list(processor.image_mean) == llava_models.MEAN
    assert Preprocess.from_directory(tmp_path / "vlm").size == 48


def test_the_32k_baseline_of_mistral(tokenizer: Any, tmp_path: Path) -> None:
    """LLaVA-NeXT-Video: AnyRes images, a learned newline, once after a video's pooled frames; logits written out."""
    from transformers import MistralConfig, MistralForCausalLM

    _, tower, projector = llava_models.parts(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=len(tokenizer) + 128,
        **sizes,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    lm = MistralForCausalLM(config).bfloat16().eval()
    tensors = llava_models.tensors_of(lm, tower, projector)
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    more: dict[str, Any] = {
        **{"model_type": "llava_mistral", "mm_patch_merge_type": "spatial_unpad", "rope_theta": 1e6},
        **{"mm_resampler_type": "spatial_pool", "mm_spatial_pool_stride": 2, "mm_spatial_pool_mode": "average"},
        **{"sliding_window": None, "hidden_act": "silu"},
        "image_grid_pinpoints": "[(48, 96), (96, 48), (96, 96), (144, 48), (48, 144)]",
    }
    released = llava_models.write(tmp_path / "released", tensors, lm, plain, **more)
    code, rows, said = lvctx("import-longva", released, "-o", tmp_path / "vlm")
    assert (code, rows[0]["dropped"]) == (0, []), said
    vlm = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "vlm").eval()
    encoding = ImageEncoding.from_config(vlm.config)
    assert (encoding.grid, vlm.config.image_grid_pinpoints) == ("anyres", anyres_pinpoints(48))
    assert vlm.config.text_config.rope_parameters["rope_theta"] == 1e6
    learned = tensors["model.image_newline"]
    assert torch.equal(vlm.model.image_newline, learned)
    pixels = torch.randn(3, 3, 48, 48).bfloat16()
    done = AutoTokenizer.from_pretrained(tmp_path / "vlm")
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Why?"}]}
    text = done.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert text == f"{done.bos_token}[INST] <video>Why? [/INST]"
    before, after = (done.encode(part, add_special_tokens=False) for part in text.split("<video>"))
    lm.config.rope_parameters["rope_theta"] = 1e6
    lm.model.rotary_emb = type(lm.model.rotary_emb)(lm.config)
    with torch.no_grad():
        features = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        hidden = F.gelu(F.linear(features, projector["0.weight"], projector["0.bias"]))
        maps = F.linear(hidden, projector["2.weight"], projector["2.bias"]).view(3, 4, 4, -1).permute(0, 3, 1, 2)
        pooled = F.avg_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(0, 2)
        embed = lm.get_input_embeddings()
        row = torch.cat([embed(torch.tensor(before)), pooled, learned[None], embed(torch.tensor(after))])
        expected = lm(inputs_embeds=row[None]).logits[0]
        ids = torch.tensor([before + [vlm.config.video_token_id] * (3 * 4 + 1) + after])
        found = vlm(input_ids=ids, pixel_values_videos=pixels[None]).logits[0]
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)
    for wrong in (
        {"mm_spatial_pool_stride": 4},
        {"image_grid_pinpoints": [[48, 96]]},
        {"mm_newline_position": "frame"},
    ):
        refused = llava_models.write(tmp_path / "wrong", tensors, lm, plain, **more | wrong)
        assert lvctx("import-longva", refused, "-o", tmp_path / "no")[0] == 3


def test_it_is_a_model_for_the_other_commands(released: Path, nano: Any, tmp_path: Path) -> None:
    assert lvctx("import-longva", released, "--context", 2048, "-o", tmp_path / "vlm")[0] == 0
    bikes = nano.clips / "bikes.mp4"
    code, rows, said = lvctx("encode-video", bikes, "--model", tmp_path / "vlm", "--frames", 3, "-o", tmp_path / "f")
    assert code == 0, said
    options = ("--ask", "Why?", "--max-new-tokens", 2)
    code, rows, said = lvctx("vqa", rows[0]["path"], "--model", tmp_path / "vlm", *options)
    assert code == 0, said
    assert rows[0]["frames"] == 3
    assert lvctx("info", tmp_path / "vlm", "--json")[1][0]["model"]["context"] == 2048


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("model.mm_projector.2.bias"), "lacks model.mm_projector.2.bias"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}), "holds model.layers.3.mlp.up_proj"),
        (lambda t: t.update({"model.vision_resampler.x": torch.zeros(2)}), "holds model.vision_resampler.x"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), "model.norm.weight: [7]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "model.norm.weight is I8"),
    ],
)
def test_every_tensor_is_accounted_for(change: Any, words: str, tokenizer: Any, tmp_path: Path) -> None:
    lm, tower, projector = llava_models.parts(tokenizer)
    tensors = llava_models.tensors_of(lm, tower, projector)
    change(tensors)
    llava_models.write(tmp_path / "r", tensors, lm, tokenizer)
    code, _, said = lvctx("import-longva", tmp_path / "r", "-o", tmp_path / "vlm")
    assert (code, words in said) == (3, True), said
    assert not (tmp_path / "vlm").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model_type": "qwen2"}, "no LLaVA checkpoint"),
        ({"mm_patch_merge_type": "flat"}, 'mm_patch_merge_type is "flat"'),
        ({"mm_projector_type": "linear"}, 'mm_projector_type is "linear"'),
        ({"mm_vision_tower": "./nowhere"}, "give --tower"),
    ],
)
def test_what_is_no_longva_is_refused(more: Any, words: str, tokenizer: Any, tmp_path: Path) -> None:
    lm, tower, projector = llava_models.parts(tokenizer)
    llava_models.write(tmp_path / "r", llava_models.tensors_of(lm, tower, projector), lm, tokenizer, **more)
    code, _, said = lvctx("import-longva", tmp_path / "r", "-o", tmp_path / "vlm")
    assert (code, words in said) == (3, True), said


def test_what_old_code_saved_beside_the_weights_is_dropped_and_named(tokenizer: Any, tmp_path: Path) -> None:
    lm, tower, projector = llava_models.parts(tokenizer)
    tensors = llava_models.tensors_of(lm, tower, projector)
    ids = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"
    tensors |= {ids: torch.arange(17.0)[None], "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    llava_models.write(tmp_path / "r", tensors, lm, tokenizer)
    code, rows, said = lvctx("import-longva", tmp_path / "r", "-o", tmp_path / "vlm")
    assert code == 0, said
    assert rows[0]["dropped"] == sorted([ids, "model.image_newline", "model.layers.0.self_attn.rotary_emb.inv_freq"])


def test_a_tower_from_elsewhere(tokenizer: Any, tmp_path: Path) -> None:
    """LLaVA leaves a frozen tower out of its checkpoints; `--tower` brings it, in the checkpoint's type."""
    lm, tower, projector = llava_models.parts(tokenizer)
    tensors = llava_models.tensors_of(lm, tower, projector)
    tensors = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    llava_models.write(tmp_path / "r", tensors, lm, tokenizer, mm_vision_tower="./clip")
    tower.float().save_pretrained(tmp_path / "clip")
    pixels = {"image_mean": llava_models.MEAN, "image_std": llava_models.STD, "do_normalize": True, "resample": 3}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    code, _, said = lvctx("import-longva", tmp_path / "r", "-o", tmp_path / "vlm")
    assert (code, "give --tower" in said) == (3, True)
    code, rows, said = lvctx("import-longva", tmp_path / "r", "--tower", tmp_path / "clip", "-o", tmp_path / "vlm")
    assert code == 0, said
    assert rows[0]["tower"] == str(tmp_path / "clip")
    torch.manual_seed(9)
    seen = torch.randn(2, 3, 48, 48).bfloat16()
    expected = llava_logits(tmp_path, tokenizer, seen, "Why?")
    torch.testing.assert_close(
        stock_logits(tmp_path / "vlm", seen, "Why?").float(), expected.float(), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_without_room_grows_by_its_mean(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    old = len(tokenizer)
    lm, tower, projector = llava_models.parts(tokenizer, rows=old, tied=tied)
    llava_models.write(tmp_path / "r", llava_models.tensors_of(lm, tower, projector), lm, tokenizer)
    code, rows, said = lvctx("import-longva", tmp_path / "r", "-o", tmp_path / "vlm")
    assert code == 0, said
    grown = all_tensors(tmp_path / "vlm")["language_model.model.embed_tokens.weight"]
    weight = lm.get_input_embeddings().weight
    assert len(grown) == rows[0]["embedding_rows"] == -(-(old + 2) // 64) * 64
    assert torch.equal(grown[:old], weight)
    mean = weight.double().mean(0)
    torch.testing.assert_close(grown[old:].double(), mean.expand(len(grown) - old, -1), atol=1e-5, rtol=2**-7)
    vlm = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "vlm")
    assert vlm.get_input_embeddings().weight.shape == (len(grown), 32)
    assert torch.equal(vlm.lm_head.weight[old - 1], lm.lm_head.weight[-1])


def test_a_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a.0": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).half(),
        "a": torch.ones(1),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shards = read_weights(tmp_path)
    write_weight_shard(tmp_path / "again", shards["model.safetensors"])
    again = load_file(tmp_path / "again")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors | again)
    same = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(same, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_weight_shard(tmp_path / "again", read_weights(tmp_path)["model.safetensors"])
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_finished_is_done_and_another_model_is_not_written_over(
    released: Path, tiny_tower: Path, tmp_path: Path
) -> None:
    out = tmp_path / "vlm"
    first = lvctx("import-longva", released, "-o", out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert lvctx("import-longva", released, "-o", out) == first
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    code, _, said = lvctx("import-longva", released, "--context", 77, "-o", out)
    assert (code, "context: None -> 77" in said) == (3, True)
    assert lvctx("import-longva", released, "--context", 77, "-o", out, "--force")[1][0]["context"] == 77
    assert lvctx("import-longva", released, "-o", released)[0] == 2
    code, _, said = lvctx("import-longva", released, "-o", tiny_tower)
    assert (code, "already holds files" in said) == (3, True)
    assert (tiny_tower / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_import_continues_to_the_same_bytes(tokenizer: Any, tmp_path: Path) -> None:
    """Killed while the second shard is written: the first stays, and what comes out is what one run writes."""
    lm, tower, projector = llava_models.parts(tokenizer)
    released = llava_models.write(tmp_path / "r", llava_models.tensors_of(lm, tower, projector), lm, tokenizer)
    assert lvctx("import-longva", released, "-o", tmp_path / "whole")[0] == 0
    out = tmp_path / "vlm"
    script = (
        "import time\n"
        "from lvctx.artifacts import weights\n"
        "read_range = weights.read_range\n"
        "def slowly(*a):\n"
        "    for chunk in read_range(*a):\n"
        "        time.sleep(0.03)\n"
        "        yield chunk\n"
        "weights.read_range = slowly\n"
        "from lvctx.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "import-longva", str(released), "-o", str(out)]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        shard = out / "model-00001-of-00003.safetensors"
        second = out / ".model-00002-of-00003.safetensors.partial"
        second.unlink(missing_ok=True)
        while not second.exists() and running.poll() is None:
            time.sleep(0.002)
        running.send_signal(number)
        assert running.wait(timeout=60) == code
        assert not (out / "MANIFEST.json").exists()
        written = shard.stat().st_mtime_ns
    assert lvctx("import-longva", released, "-o", out)[0] == 0
    assert shard.stat().st_mtime_ns == written
    names = sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(out)) == names
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def ours(tiny_lm: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM as align writes it: tied Llama, a tower that no hub has."""
    _, tower, _ = llava_models.parts(tokenizer)
    out = tmp_path_factory.mktemp("ours")
    tower.save_pretrained(out / "tower")
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_rescale": True, "rescale_factor": 1 / 255}
    (out / "tower" / "preprocessor_config.json").write_text(json.dumps(pixels))
    fresh = AutoTokenizer.from_pretrained(tiny_lm)
    vlm = assemble(load_model(tiny_lm), tower.float(), fresh, where=tiny_lm, seed=0)
    save_vlm(vlm, fresh, out / "tower", out / "vlm")
    write_side_files(out / "vlm")
    return out / "vlm"


def test_import_of_an_export_is_the_model_itself(ours: Path, tmp_path: Path) -> None:
    """Every file, byte for byte, but for the card, which tells how the model was made."""
    assert lvctx("export", ours, "--to", "llava", "-o", tmp_path / "llava")[::2] == (0, "")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (config["model_type"], config["mm_vision_tower"]) == ("llava_llama", "tower")
    names = load_file(tmp_path / "llava" / "model.safetensors").keys()
    assert {name.split(".")[1] for name in names} == {
        *("embed_tokens", "layers", "norm", "mm_projector", "vision_tower", "image_newline")
    }
    code, _, said = lvctx("import-longva", tmp_path / "llava", "-o", tmp_path / "vlm")
    assert code == 0, said
    names = {p.name for p in ours.iterdir()}
    assert {p.name for p in (tmp_path / "vlm").iterdir()} == names | {"MANIFEST.json"}
    cards = [ModelCard.load(tmp_path / folder / "README.md").data for folder in ("llava", "vlm")]
    assert [card.library_name for card in cards] == [None, "transformers"], "stock code does not load LLaVA's format"
    for name in names - {"README.md"}:
        assert (tmp_path / "vlm" / name).read_bytes() == (ours / name).read_bytes(), name


@pytest.mark.parametrize("scheme", ["yarn --factor 4 --attention-factor 1.4", "pi --factor 2"])
def test_scaled_positions_go_there_and_back(ours: Path, tmp_path: Path, scheme: str) -> None:
    """Where transformers 4 looks for them in config.json, where transformers 5 does in a file of its own."""
    assert (
        lvctx("extend-lm", "--model", ours, "--rope", *scheme.split(), "--steps", "0", "-o", tmp_path / "long")[0] == 0
    )
    assert lvctx("export", tmp_path / "long", "--to", "llava", "-o", tmp_path / "llava")[0] == 0
    wanted = json.loads((tmp_path / "long" / "config.json").read_text())["text_config"]["rope_parameters"]
    flat = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (flat["rope_theta"], flat["rope_scaling"]) == (wanted["rope_theta"], wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llava")
    assert tokenizer.encode("Hello.") == AutoTokenizer.from_pretrained(ours).encode("Hello.")
    code, _, said = lvctx("import-longva", tmp_path / "llava", "-o", tmp_path / "back")
    assert code == 0, said
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back["text_config"]["rope_parameters"] == wanted
    before, after = all_tensors(tmp_path / "long"), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_export_of_an_import_is_the_checkpoint(released: Path, tmp_path: Path) -> None:
    """But for the newline that UniRes does not read, and keys of config.json that say nothing about the model."""
    assert lvctx("import-longva", released, "-o", tmp_path / "vlm")[0] == 0
    code, _, said = lvctx("export", tmp_path / "vlm", "--to", "llava", "-o", tmp_path / "llava")
    assert code == 0, said
    before, after = all_tensors(released), all_tensors(tmp_path / "llava")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if n != "model.image_newline")
    old, new = (json.loads((d / "config.json").read_text()) for d in (released, tmp_path / "llava"))
    assert new["mm_vision_tower"] == "tower", "no tower of the hub's has its shape"
    others = {"mm_vision_tower", "sliding_window", "image_grid_pinpoints", "transformers_version"}
    assert {key: new.get(key) for key in old.keys() - others} == {key: old[key] for key in old.keys() - others}
    before = lvctx("export", tmp_path / "vlm", "--to", "llava", "-o", tmp_path / "llava")
    assert lvctx("export", tmp_path / "vlm", "--to", "llava", "-o", tmp_path / "llava") == before


@pytest.mark.parametrize(("key", "value"), [("image_grid", "anyres"), ("image_grid_rule", "paper")])
def test_images_that_released_code_would_read_otherwise(ours: Path, key: str, value: str) -> None:
    config = json.loads((ours / "config.json").read_text())
    assert llava_config(config, 100)["model_type"]
    with pytest.raises(UsageError, match=value):
        llava_config(config | {key: value}, 100)


def test_export_to_hf_leaves_what_is_only_ours(released: Path, tiny_lm: Path, tmp_path: Path) -> None:
    vlm, out = tmp_path / "vlm", tmp_path / "hf"
    assert lvctx("import-longva", released, "-o", vlm)[0] == 0
    (vlm / "metrics.jsonl").write_text("{}\n")
    first = lvctx("export", vlm, "--to", "hf", "-o", out)
    assert first[0] == 0
    assert {p.name for p in out.iterdir()} == {p.name for p in vlm.iterdir()} - {"metrics.jsonl"}
    assert read_manifest(out)["context"] == read_manifest(vlm)["context"]
    shard = "model-00001-of-00003.safetensors"
    assert (out / shard).samefile(vlm / shard)
    (out / shard).unlink()
    (out / "config.json").unlink()
    assert lvctx("export", vlm, "--to", "hf", "-o", out) == first, "an unfinished one is completed"
    LlavaOnevisionForConditionalGeneration.from_pretrained(out)
    code, _, said = lvctx("export", tiny_lm, "--to", "hf", "-o", out)
    assert (code, "not part of this model" in said) == (3, True)
    assert lvctx("export", tiny_lm, "--to", "llava", "-o", tmp_path / "x")[0] == 2
    assert lvctx("export", vlm, "--to", "hf", "-o", vlm)[0] == 2
