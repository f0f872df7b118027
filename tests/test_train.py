"""The training engine: schedules, data order, conversations, and stopping by a signal at any step."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from support import aligning, warm_server
from support.aligning import draw, metrics, talk, write
from support.killing import Toy
from support.refusals import refused
from torch import Tensor

from lvctx.data.chat_encoding import encode_conversation
from lvctx.data.conversations import read_conversations
from lvctx.errors import InputError, Stopped, UsageError
from lvctx.models.adapter import longest_sample
from lvctx.models.loading import load_tokenizer
from lvctx.models.loss import IGNORED
from lvctx.models.vlm_assembly import VIDEO_TOKEN
from lvctx.training.row_order import indices
from lvctx.training.schedule import rate
from lvctx.training.signals import uninterrupted

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def test_schedules_are_their_formulas() -> None:
    cosine = [rate(s, steps=100, schedule="cosine", warmup=0.03) for s in range(100)]
    assert cosine[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert cosine[51] == pytest.approx(0.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert [rate(s, steps=4, schedule="constant", warmup=0.0) for s in range(4)] == [1.0] * 4
    assert [rate(s, steps=4, schedule="linear", warmup=0.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]


@given(st.integers(1, 7), st.integers(1, 20), st.integers(0, 5), st.integers(0, 3))
def test_every_epoch_reads_every_sample_once(batch: int, samples: int, seed: int, epochs: int) -> None:
    steps = math.ceil((epochs + 1) * samples / batch)
    order = [i for step in range(steps) for i in indices(step, batch=batch, samples=samples, seed=seed)]
    for epoch in range(epochs + 1):
        assert sorted(order[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


@pytest.mark.parametrize("stop_at", range(1, 13))
def test_resumed_is_bitwise_the_uninterrupted_run_wherever_it_stopped(tmp_path: Path, stop_at: int) -> None:
    expected = Toy(tmp_path / "whole").run()
    with pytest.raises(Stopped):
        Toy(tmp_path / "parts", stop_at=stop_at).run()
    resumed = Toy(tmp_path / "parts").run()
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_loss_is_a_mean_over_all_counted_tokens_of_the_step(tmp_path: Path) -> None:
    """Two micro-batches of different sizes weigh by their tokens: the row equals one batch of both."""
    toy = Toy(tmp_path, steps=1)
    with torch.no_grad():
        parts = [toy.loss(i) for i in indices(0, batch=2, samples=5, seed=0)]
    toy.run()
    row = metrics(tmp_path)[0]
    assert row["tokens"] == sum(count for _, count in parts)
    assert row["loss"] == pytest.approx(sum(total.item() for total, _ in parts) / row["tokens"], rel=1e-6)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        Toy(tmp_path, stop_at=6).run()
    with pytest.raises(InputError, match=r"other settings \(seed: 0 -> 1\)"):
        Toy(tmp_path).run(seed=1)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    with torch.no_grad():
        toy.model.bias.fill_(math.inf)
    weight = toy.model.weight.clone()
    with pytest.raises(InputError, match=r"step 0: rank 0: loss inf on \d, \d"):
        toy.run()
    assert torch.equal(toy.model.weight, weight)


def test_a_signal_waits_for_the_end_of_the_step() -> None:
    order = []

    def stop(number: int, frame: object) -> None:
        order.append("signal")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            order.append("step")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert order == ["step", "signal"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_only_the_assistants_words_and_their_end_are_counted(pictures: Path, tiny_lm: Path) -> None:
    """Golden: written down by hand for ChatML, two turns, one picture of three tokens."""
    tokenizer = load_tokenizer(tiny_lm)
    tokenizer.chat_template = CHATML.replace(
        "{% endfor %}", "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO_TOKEN]})
    data = write(pictures / "d.json", [talk("<image>\nWhat?", "red", "And?", "dark blue", image="a.png")])
    (conversation,) = read_conversations(data, pictures)
    sequence = encode_conversation(conversation, tokenizer, lambda image: 3)
    text = "".join(tokenizer.convert_ids_to_tokens(sequence.ids)).replace("Ġ", " ").replace("Ċ", "\n")
    assert text.startswith(
        "<|im_start|>user\n" + VIDEO_TOKEN * 3 + "What?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"
    )
    counted = tokenizer.decode([i for i in sequence.labels if i != IGNORED])
    assert counted == "red<|im_end|>dark blue<|im_end|>"
    for label, following in zip(sequence.labels, sequence.ids[1:], strict=False):
        assert label in (IGNORED, following)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("<image>\nWhat?", "red", image="none.png"), "no such image"),
        (talk("<image><image>What?", "red", image="a.png"), "2 <image> marks for 1 images"),
        (talk("What?", "red", image="a.png"), "0 <image> marks for 1 images"),
        (talk("<image>\nWhat?", "", image="a.png"), "an empty answer"),
        (talk("<image>\nWhat?", "red", "And?", " \n", image="a.png"), "an empty answer"),
        (talk("What?"), "no answer to train on"),
        (talk("Hi", "Ho", "<image>What?", image="a.png"), "an image or video after the last answer"),
        (talk("<video>What?", "red", video="a.mp4"), "a video"),
        (talk("<image>What?", "red", image=3), "`image` is neither a path nor a list of paths"),
        ({"conversations": ["Hi", "Ho"]}, "a turn from 'Hi'"),
        ([1], "not a JSON object"),
        ({"conversations": [{"from": "cat", "value": "miau"}]}, "a turn from 'cat'"),
        ({"image": "a.png"}, "no list of `conversations`"),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_a_bad_row_is_named(pictures: Path, row: Any, message: str, lines: bool) -> None:
    data = write(pictures / "d.json", [talk("Hi", "Ho"), row], lines=lines)
    with pytest.raises(InputError, match=message) as caught:
        read_conversations(data, pictures)
    assert caught.value.where == (f"{data}:2" if lines else f"{data}[1]")


def test_all_bad_rows_are_counted_and_the_first_is_named(pictures: Path) -> None:
    rows = [talk("Hi", "Ho"), *(talk("<image>What?", "red", image=f"{i}.png") for i in range(3))]
    with pytest.raises(
        InputError, match=r"d\.json\[1\]: no such image .*0\.png \(3 bad rows in total\); check --images"
    ):
        read_conversations(write(pictures / "d.json", rows), pictures)


def test_a_malformed_line_is_named_by_its_number(pictures: Path) -> None:
    data = pictures / "d.jsonl"
    data.write_text(json.dumps(talk("Hi", "Ho")) + '\n{"conversations": [\n')
    with refused(InputError, "d.jsonl:2"):
        read_conversations(data, pictures)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Four pictures of 2 x 1 and 2 x 2 grids for the tiny tower, with questions."""
    draw(tmp_path)
    rows = [talk("<image>\nWhat color?", ["red", "blue"][i % 2], image=f"{i}.png") for i in range(4)]
    rows.append(talk("Say hi.", "hi"))
    write(tmp_path / "data.json", rows)
    return tmp_path


def align(drawn: Path, out: Path, tiny_lm: Path, tiny_tower: Path, **changed: Any) -> None:
    options = {"lm": tiny_lm, "tower": tiny_tower} | changed
    aligning.align(drawn / "data.json", out, options.pop("lm"), options.pop("tower"), **options)


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def changed(a: Path, b: Path) -> set[str]:
    old, new = weights(a), weights(b)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_stages_train_their_parts_and_freeze_the_rest(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path
) -> None:
    first, second = tmp_path / "p1", tmp_path / "p3"
    align(drawn, first, tiny_lm, tiny_tower, steps=1)
    align(drawn, second, tiny_lm, tiny_tower, steps=3)
    assert all("multi_modal_projector" in name for name in changed(first, second))
    assert len(changed(first, second)) == 4
    full = {"stage": "full", "init": str(first), "lm": None, "tower": None, "steps": 1, "lr": 1e-3}
    align(drawn, tmp_path / "lora", tiny_lm, tiny_tower, **full, lora=4)
    trained = changed(first, tmp_path / "lora")
    assert any("q_proj" in name for name in trained)
    assert not any("mlp" in name or "vision_tower" in name or "embed_tokens" in name for name in trained)
    align(drawn, tmp_path / "full", tiny_lm, tiny_tower, **full, tower_lr=1e-3)
    trained = changed(first, tmp_path / "full")
    assert any("vision_tower" in name for name in trained)
    assert any("mlp" in name for name in trained)
    assert "image_newline" in trained, "the newline follows its token"


def test_align_learns_its_images(drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path) -> None:
    align(drawn, tmp_path / "vlm", tiny_lm, tiny_tower, steps=40, batch=5, stage="full", lr=5e-3)
    losses = [row["loss"] for row in metrics(tmp_path / "vlm")]
    assert losses[-1] < 0.1 * losses[0]


def test_aligned_twice_same_bytes_and_micro_batches_do_not_matter_to_the_definition(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path
) -> None:
    for name in ("a", "b"):
        align(drawn, tmp_path / name, tiny_lm, tiny_tower)
    assert (tmp_path / "a" / "MANIFEST.json").read_bytes() == (tmp_path / "b" / "MANIFEST.json").read_bytes()


def test_recomputed_layers_give_the_same_weights(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    passes, plain = [0], LlamaMLP.forward

    def counted(self: LlamaMLP, x: Tensor) -> Tensor:
        passes[-1] += 1
        return plain(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    for name, recomputed in (("kept", "none"), ("recomputed", "layers")):
        passes.append(0)
        align(drawn, tmp_path / name, tiny_lm, tiny_tower, stage="full", lora=2, checkpoint_activations=recomputed)
    assert passes[2] == 2 * passes[1] > 0
    kept, recomputed_too = (weights(tmp_path / name) for name in ("kept", "recomputed"))
    assert all(torch.equal(kept[name], recomputed_too[name]) for name in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "x"}, "either --init, or"),
        ({"lm": None}, "given together"),
        ({"lora": 4}, "needs --stage full"),
        ({"epochs": 1.0}, "not both"),
    ],
)
def test_contradicting_flags(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        align(drawn, tmp_path / "x", tiny_lm, tiny_tower, **options)


def test_sigterm_saves_and_the_same_command_ends_with_the_same_model(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path
) -> None:
    """The real program: killed by SIGTERM in mid-training it exits 75; run again it goes on to the same bytes."""

    def command(out: Path) -> list[str]:
        flags = {"--lm": tiny_lm, "--tower": tiny_tower, "--data": drawn / "data.json", "--images": drawn, "-o": out}
        pairs = [str(x) for pair in flags.items() for x in pair]
        return ["align", *pairs, "--steps", "60", "--batch", "4"]

    subprocess.run([warm_server.start(), *command(tmp_path / "whole")], check=True, capture_output=True)
    child = warm_server.Command(*command(tmp_path / "parts"))
    log = tmp_path / "parts" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        assert child.poll() is None, "ended before it could be stopped"
        time.sleep(0.01)
    child.terminate()
    _, said = child.communicate()
    assert child.returncode == 75, said
    assert "run the same command again" in said
    assert not (tmp_path / "parts" / "MANIFEST.json").exists()
    subprocess.run([warm_server.start(), *command(tmp_path / "parts")], check=True, capture_output=True)
    assert changed(tmp_path / "whole", tmp_path / "parts") == set()
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_an_adapter_is_small_and_another_run_starts_from_it(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path
) -> None:
    """At rate 0 the second run changes nothing, so what it started from is what it writes."""
    full = {"stage": "full", "lora": 4, "lr": 1e-2}
    align(drawn, tmp_path / "a", tiny_lm, tiny_tower, **full)
    first = tmp_path / "a" / "adapter" / "adapter_model.safetensors"
    assert longest_sample(first.parent) == longest_sample(first)
    still = {"lr": 0.0, "projector_lr": 1e-30, "steps": 1}
    align(drawn, tmp_path / "b", tiny_lm, tiny_tower, **full | still, adapter=(first,))
    old, new = load_file(first), load_file(tmp_path / "b" / "adapter" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert any(t.abs().sum() > 0 for name, t in old.items() if "lora_B" in name), "it had learned something"
    write(tmp_path / "data.json", [talk("Say hi.", "hi")])
    align(drawn, tmp_path / "short", tiny_lm, tiny_tower, **full, steps=1, batch=1)
    alone = longest_sample(tmp_path / "short" / "adapter" / "adapter_model.safetensors")
    align(drawn, tmp_path / "after", tiny_lm, tiny_tower, **full | still, batch=1, adapter=(first,))
    assert 0 < alone < longest_sample(first) == longest_sample(tmp_path / "after") == longest_sample(tmp_path / "b")
    assert first.stat().st_size < 0.1 * (tmp_path / "a" / "model.safetensors").stat().st_size
    with refused(InputError, "adapter/adapter_model.safetensors"):
        align(drawn, tmp_path / "c", tiny_lm, tiny_tower, **full | {"lora": 8}, adapter=(first,))


def test_a_frozen_projector_stays_out_of_the_adapter_and_the_later_adapter_wins(
    drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path
) -> None:
    """A LoRA trained under one projector, then run under another: each part comes from its own file."""
    full = {"stage": "full", "lora": 4}
    align(drawn, tmp_path / "both", tiny_lm, tiny_tower, **full)
    both = tmp_path / "both" / "adapter" / "adapter_model.safetensors"
    align(drawn, tmp_path / "lora", tiny_lm, tiny_tower, **full, projector_lr=0.0, adapter=(both,))
    lora = tmp_path / "lora" / "adapter" / "adapter_model.safetensors"
    assert all("lora_" in name for name in load_file(lora))
    given = load_file(both)["base_model.model.model.multi_modal_projector.linear_1.weight"].float()
    assert torch.equal(weights(tmp_path / "lora")["multi_modal_projector.linear_1.weight"], given)
    still = {"lr": 0.0, "projector_lr": 1e-30, "steps": 1}
    align(drawn, tmp_path / "end", tiny_lm, tiny_tower, **full | still, adapter=(both, lora))
    end, want = load_file(tmp_path / "end" / "adapter" / "adapter_model.safetensors"), load_file(both) | load_file(lora)
    assert end.keys() == want.keys()
    assert all(torch.equal(end[name], want[name]) for name in want)


def test_rates_that_train_nothing_are_refused(drawn: Path, tmp_path: Path, tiny_lm: Path, tiny_tower: Path) -> None:
    for options in ({"lr": 0.0}, {"stage": "full", "lr": 0.0}, {"stage": "full", "lora": 4, "lr": 0.0}):
        with pytest.raises(UsageError, match="nothing would be trained"):
            align(drawn, tmp_path / "x", tiny_lm, tiny_tower, **options)
