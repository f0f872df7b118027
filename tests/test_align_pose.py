"""`align --pose`: short samples with positions over the language model's whole context.

Shapes: T tokens of a micro-batch, L of a sample, E language-model width.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from support.aligning import align, draw, make_forward, metrics, talk, write
from transformers import CLIPVisionModel
from typer.testing import CliRunner

from lvctx.cli.app import app
from lvctx.data.conversations import read_conversations
from lvctx.models.loading import context_length, load_model, load_tokenizer
from lvctx.models.vlm_assembly import VIDEO_TOKEN, assemble
from lvctx.training.batching import encode_sample, skip_positions
from lvctx.vlm.image_tiling import ImageEncoding

ROWS = [
    talk("<image>What?", "red", image="1.png"),
    talk("Hi.", "Hello there, how are you?"),
    talk("<image><image>Which?", "the first", image=["0.png", "3.png"]),
]


def test_spread_samples_are_read_as_stock_transformers_reads_them_at_these_positions(
    tiny_lm: Path, tiny_tower: Path, tmp_path: Path
) -> None:
    """Three in one row: neither the jumps nor the neighbours part a sample or join it to another."""
    draw(tmp_path)
    tokenizer, lm = load_tokenizer(tiny_lm), load_model(tiny_lm, dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(tiny_tower).eval()
    vlm = assemble(lm, tower, tokenizer, where=tiny_lm, seed=0)
    read = read_conversations(write(tmp_path / "data.json", ROWS), tmp_path)
    encoding = ImageEncoding.of(vlm.config.vision_config, grid="unires", rule="code")
    context, rng = context_length(vlm.config), np.random.default_rng(5)
    samples = [
        skip_positions(encode_sample(n, (row,), tokenizer, encoding, max_length=999), context, rng)
        for n, row in enumerate(read)
    ]
    jumps = [int(np.diff(s.sequences[0].positions or []).max()) for s in samples]
    assert all(jump > 1 for jump in jumps), "this seed moves all three apart"
    (whole,) = skip_positions(samples[0], 5, rng).sequences
    assert whole.positions == list(range(len(whole.ids))), "longer than the context: as it is"
    forward = make_forward(vlm, tokenizer, encoding, tiny_tower, pose=True)
    video = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
    with torch.no_grad():
        ours_TE = forward(samples, lambda hidden, *_: hidden)
        vlm.model.language_model.set_attn_implementation("eager")
        truth = []
        for sample in samples:
            (sequence,) = sample.sequences
            ids = torch.tensor(sequence.ids)
            embeds_LE = vlm.get_input_embeddings()(ids.masked_fill(ids == video, 0))
            if sample.images:
                embeds_LE[ids == video] = torch.cat(forward.blocks(sample))
            read_alone = vlm.model.language_model(
                inputs_embeds=embeds_LE[None],
                position_ids=torch.tensor([sequence.positions]),
                attention_mask=torch.ones_like(ids)[None],
                use_cache=False,
            )
            truth.append(read_alone.last_hidden_state[0])
    torch.testing.assert_close(ours_TE, torch.cat(truth), rtol=1e-4, atol=1e-5)


def test_every_step_draws_anew_and_the_same_seed_the_same(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    draw(tmp_path)
    data = write(tmp_path / "data.json", ROWS[:1])
    for name, pose, lr in (("a", True, 0.0), ("b", True, 0.0), ("plain", False, 0.0)):
        align(
            data,
            tmp_path / name,
            tiny_lm,
            tiny_tower,
            stage="full",
            pose=pose,
            lr=lr,
            projector_lr=1e-9,
            batch=1,
            lora=2,
        )
    losses = {name: [row["loss"] for row in metrics(tmp_path / name)] for name in ("a", "b", "plain")}
    assert losses["a"] == losses["b"]
    # One sample over and over, nothing learned to speak of: only its positions make a difference.
    assert np.ptp(losses["plain"]) < 1e-6 < np.ptp(losses["a"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_sliding_window_is_refused_and_so_is_dpo(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    draw(tmp_path)
    data = write(tmp_path / "data.json", ROWS)
    windowed = shutil.copytree(tiny_lm, tmp_path / "windowed")
    config = json.loads((windowed / "config.json").read_text())
    (windowed / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    inputs = f"--data {data} --images {tmp_path} --steps 1 -o {tmp_path}/o -q"
    done = CliRunner().invoke(app, f"align --pose --lm {windowed} --tower {tiny_tower} {inputs}".split())
    assert done.exit_code == 3
    assert "sliding window" in done.stderr
    assert "drop --pose" in done.stderr
    done = CliRunner().invoke(app, f"align --stage dpo --pose --init {tiny_lm} {inputs}".split())
    assert done.exit_code == 2
    assert "--pose" in done.stderr
