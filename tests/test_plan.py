"""The plan against published counts: stock models on the meta device, published speeds and limits."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_niah import run
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lvctx.errors import InputError
from lvctx.parallel import hf_attention
from lvctx.training.decoder_shape import DecoderShape, read_shape
from lvctx.training.extend import ExtendTask, resolve_extend
from lvctx.training.extend_config import ExtendConfig
from lvctx.training.memory_model import (
    DEVICES,
    Recomputation,
    Spread,
    flops,
    least_recomputation,
    longest,
    memory,
    remedies,
    rows_together,
)
from lvctx.training.parallel_config import ParallelConfig
from lvctx.training.plan import predict
from lvctx.training.plan_config import PlanConfig

ROOT = Path(__file__).resolve().parent.parent
QWEN2_7B = ROOT / "tests" / "configs" / "qwen2-7b.json"
LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
A100 = DEVICES["a100"]
EIGHT = Spread(world=8, cp=8, rows=4)  # the paper: 4 rows a step, each over all devices


def qwen2() -> DecoderShape:
    return read_shape(json.loads(QWEN2_7B.read_text()), where=QWEN2_7B)


def test_qwen2_and_llama2_have_their_published_parameters() -> None:
    assert qwen2().parameters == 7_615_616_512
    assert read_shape(LLAMA2_7B, where="").parameters == 6_738_415_616


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_the_stock_model(kind: str, tied: bool, bias: bool) -> None:
    numbers: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "head_dim": 16,
        "tie_word_embeddings": tied,
    }
    if kind in ("llama", "qwen3"):
        numbers["attention_bias"] = bias
    if kind == "llama":
        numbers["mlp_bias"] = bias
    config = AutoConfig.for_model(kind, **numbers)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    assert read_shape(config.to_dict(), where="").parameters == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        # The released text_config of google/gemma-3-4b-pt, whose other numbers are transformers' defaults.
        ("gemma3_text", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}),
        ("gemma3_text", {"hidden_size": 96, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
        ("qwen3_moe", {"head_dim": 128, "num_hidden_layers": 48}),  # Qwen3-30B-A3B
        ("qwen3_moe", {"num_hidden_layers": 7, "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 64}),
        ("mixtral", {}),  # Mixtral-8x7B
    ],
)
def test_parameters_of_experts_and_windowed_layers(kind: str, numbers: dict[str, Any]) -> None:
    """Those that config.json states, and those that transformers writes into it."""
    config = AutoConfig.for_model(kind, **numbers)
    with torch.device("meta"):
        expected = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert read_shape(config.to_dict(), where="").parameters == expected
    if kind == "gemma3_text":
        sizes = {key: value for key, value in config.to_dict().items() if key in ("num_hidden_layers", "hidden_size")}
        inner = {"intermediate_size": config.intermediate_size}
        assert read_shape({"model_type": kind, **sizes, **inner, **numbers}, where="").parameters == expected


def test_experts_and_windows_in_the_work_of_a_token() -> None:
    """Qwen3-30B-A3B has 3.3 of its 30.5 billion parameters active (its model card); Gemma 3's windows cap attention."""
    moe = read_shape(AutoConfig.for_model("qwen3_moe", head_dim=128, num_hidden_layers=48).to_dict(), where="")
    assert moe.parameters == pytest.approx(30.5e9, rel=0.01)
    embedding = moe.vocab * moe.hidden  # counted in the card, not multiplied by
    assert flops(moe, 1, 1) / 6 + embedding == pytest.approx(3.3e9, rel=0.02)
    gemma = read_shape(AutoConfig.for_model("gemma3_text", sliding_window=512).to_dict(), where="")
    full = replace(gemma, sliding_layers=0)
    pairs = [sum(min(i + 1, 512) for i in range(length)) - sum(range(1, length + 1)) for length in (512, 4096)]
    for length, fewer in zip((512, 4096), pairs, strict=True):
        expected = 12 * gemma.heads * gemma.head_dim * gemma.sliding_layers * fewer
        saved = flops(gemma, length, length) - flops(full, length, length)
        assert saved == pytest.approx(expected, rel=0.01)


def kept_by_a_layer(kind: str, changed: dict[str, Any], way: str, tokens: int) -> float:
    """Bytes that one layer of a stock model keeps for the backward pass, from the storages that autograd saves.

    `way` is the type of weights and products; `autocast` has float32 weights and bfloat16 products, as one device that
    trains everything; `lora` has frozen bfloat16 weights.
    """
    from lvctx.models.lora import ATTENTION, add_lora

    def saved(layers: int) -> int:
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SMALL, **changed, "num_hidden_layers": layers})
        dtype = torch.bfloat16 if way in ("bfloat16", "lora") else torch.float32
        model = AutoModel.from_config(config).to(dtype).train()
        hf_attention.use(model, where="")  # as `extend-lm` does where there are windows
        if way == "lora":
            model.requires_grad_(False)
            add_lora(model, rank=2, targets=ATTENTION, seed=0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        shapes = {tuple(p.shape) for p in model.parameters()}
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            is_copy = tuple(tensor.shape) in shapes or tuple(tensor.shape[::-1]) in shapes  # of a weight, by autocast
            if (place := tensor.untyped_storage().data_ptr()) not in weights and not is_copy:
                storages[place] = tensor
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long)
        products = torch.autocast("cpu", torch.bfloat16, enabled=way in ("autocast", "lora"))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), products:
            out = model(input_ids=ids, use_cache=False)
        assert out.last_hidden_state.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    return saved(2) - saved(1)


SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize("way", ["bfloat16", "float32", "autocast", "lora"])
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma3_text", {"sliding_window": 64, "sliding_window_pattern": 9}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96}),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3}),
    ],
)
def test_activations_are_those_that_stock_keeps(kind: str, changed: dict[str, Any], way: str) -> None:
    measured = kept_by_a_layer(kind, changed, way, 512)
    shape = read_shape({"model_type": kind, **SMALL, **changed, "num_hidden_layers": 2}, where="")
    # Several sharded devices have parameters in the type of the computation.
    spread = Spread(
        world=2 if way == "bfloat16" else 1, compute_bytes=4 if way == "float32" else 2, lora=2 if way == "lora" else 0
    )
    kept = [
        memory(shape, replace(spread, recomputation=Recomputation(kept_layers=layers)), 512, runtime=0)
        for layers in (1, 2)
    ]
    layer = kept[1][0]["activations"] - kept[0][0]["activations"]
    assert layer == pytest.approx(measured, rel=0.1)


def test_lora_is_what_peft_adds(tiny_lm: Path) -> None:
    from lvctx.models.loading import load_model, read_config
    from lvctx.models.lora import ATTENTION, add_lora, lora_parameters

    wrapped = add_lora(load_model(tiny_lm), rank=4, targets=ATTENTION, seed=0)
    shape = read_shape(read_config(tiny_lm), where=tiny_lm)
    assert shape.lora(4) == sum(p.numel() for p in lora_parameters(wrapped))


@pytest.mark.parametrize(("length", "speed", "mfu"), [(65536, 7816, 0.28), (512000, 2133, 0.38), (700000, 1603, 0.38)])
def test_work_agrees_with_published_speed_and_utilisation(length: int, speed: float, mfu: float) -> None:
    """EasyContext on 8 A100, Llama-2-7B: tokens a second and MFU as published."""
    work = flops(read_shape(LLAMA2_7B, where=""), length, 1)
    assert work * speed / (8 * A100.flops) == pytest.approx(mfu, abs=0.011)


def test_longvas_training_takes_its_two_days() -> None:
    """LongVA section 3.1: 1000 steps of 896,000 tokens in rows of 224,000 on 8 A100 are about two days."""
    hours = 1000 * flops(qwen2(), 224_000, 896_000) / (8 * A100.flops * 0.35) / 3600
    assert hours == pytest.approx(48, rel=0.1)


def test_what_eight_gpus_can_do_with_qwen2_and_why() -> None:
    """The paper stops at 224K for the logits of 152,064 entries; without them it reads 3.5 times as far."""
    ours, plain = (longest(qwen2(), replace(EIGHT, full_logits=full), A100) for full in (False, True))
    assert plain == pytest.approx(224_000, rel=0.15)
    assert ours > 3.5 * 224_000
    parts, peak, _ = memory(qwen2(), replace(EIGHT, full_logits=True), 224_000, runtime=A100.runtime)
    assert parts["loss"] > 12 * 152_064 * 28_000
    assert parts["loss"] > peak / 2, "the logits are most of it"


QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


def test_a_million_tokens_fit_eight_gpus_with_tiled_mlps() -> None:
    """Published for Qwen3-8B by TRL: 1,048,576 tokens on 8 GPUs of 80 GB; its 36 layers' inputs are on the host."""
    tiles = replace(EIGHT, rows=1, recomputation=Recomputation(mlp_tiles=True))
    assert longest(qwen2(), replace(EIGHT, rows=1), A100) < 1 << 20 <= longest(qwen2(), tiles, A100)
    qwen3 = read_shape(QWEN3_8B, where="")
    assert qwen3.parameters == 8_190_735_360
    assert longest(qwen3, replace(tiles, offload_activations=True), A100) >= 1 << 20


@given(st.integers(1, 40), st.booleans())
def test_as_many_layers_are_kept_as_fit(length: int, offload_activations: bool) -> None:
    spread, device = Spread(world=8, cp=8, offload_activations=offload_activations), A100
    found = least_recomputation(qwen2(), spread, length << 15, device)

    def fits(kept: int) -> bool:
        kept_spread = replace(spread, recomputation=Recomputation(kept_layers=kept))
        return memory(qwen2(), kept_spread, length << 15, runtime=device.runtime)[1] <= 0.9 * device.memory

    fitting = [kept for kept in ([0] if offload_activations else range(29)) if fits(kept)]
    assert found == (Recomputation(kept_layers=max(fitting)) if fitting else Recomputation(mlp_tiles=True))


@given(
    st.integers(1, 64),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.sampled_from([Recomputation(kept_layers=n) for n in (0, 5, 28)] + [Recomputation(mlp_tiles=True)]),
    st.sampled_from([0, 16]),
)
def test_longest_is_where_it_stops_to_fit(
    gib: int, cp: int, offload: bool, recomputation: Recomputation, lora: int
) -> None:
    device = replace(A100, memory=gib << 30)
    spread = Spread(world=8, cp=cp, offload=offload, recomputation=recomputation, lora=lora)
    found = longest(qwen2(), spread, device)
    assert found % (1024 * cp) == 0
    peaks = [memory(qwen2(), spread, n, runtime=device.runtime)[1] for n in (found or 1, found + 1024 * cp)]
    assert peaks[1] > device.memory
    assert not found or peaks[0] <= device.memory


def test_the_suggested_flags_help() -> None:
    spread = Spread(world=8, cp=1, recomputation=Recomputation(kept_layers=28))
    before = memory(qwen2(), spread, 224_000, runtime=A100.runtime)[1]
    helps = remedies(qwen2(), spread, 224_000, A100)
    assert {"--checkpoint-activations tiles", "--cp 8", "--offload", "--lora 16"} <= {flag for flag, _ in helps}
    assert all(peak < before for _, peak in helps)


@pytest.mark.parametrize(
    ("heads", "key_heads", "measured"), [(28, 4, 184.9), (32, 8, 225.0), (16, 2, 121.0), (8, 8, 80.5)]
)
def test_ulysses_needs_what_torchs_memory_tracker_counts(heads: int, key_heads: int, measured: float) -> None:
    """Bytes per token and channel of a bfloat16 forward and backward, beside q, k, v and the output, on four ranks."""
    shape = replace(qwen2(), heads=heads, key_heads=key_heads)
    parts = memory(shape, Spread(world=4, cp=4, cp_kind="ulysses"), 4096, runtime=0)[0]
    assert parts["all_to_all_buffers"] / 1024 / shape.head_dim == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("heads", "key_heads", "part", "measured"),
    [
        (28, 4, "all_to_all_buffers", 226.2 - 185.8),
        (28, 2, "ring_buffers", 421.2 - 375.1),
        (32, 2, "ring_buffers", 58.5),
    ],
)
def test_both_need_a_copy_more_in_torchs_memory_tracker(heads: int, key_heads: int, part: str, measured: float) -> None:
    """Bytes per token and channel, four ranks: beside those of Ulysses for four key heads, else beside the ring's."""
    shape, kind = replace(qwen2(), heads=heads, key_heads=key_heads), "ulysses" if key_heads == 4 else "ring"
    spreads = (Spread(world=4, cp=4, cp_kind="both"), Spread(world=4, cp=4, cp_kind=kind))
    both, other = (memory(shape, spread, 4096, runtime=0)[0][part] for spread in spreads)
    difference = (both - other) / 1024 / shape.head_dim
    assert measured < difference < 1.4 * measured


def test_both_take_windows_where_the_devices_divide_the_key_heads() -> None:
    shape = replace(qwen2(), sliding_layers=28, window=4096)
    flags = {flag for flag, _ in remedies(shape, Spread(world=8, cp=2, cp_kind="both"), 1 << 20, A100)}
    assert "--cp 4" in flags
    assert "--cp 8" not in flags, "four key heads"
    assert "--cp 8" in {flag for flag, _ in remedies(qwen2(), Spread(world=8, cp=2, cp_kind="both"), 1 << 20, A100)}


def test_ulysses_is_suggested_for_divisors_of_the_heads_only() -> None:
    spread = Spread(world=8, cp=2, cp_kind="ulysses")
    flags = {flag for flag, _ in remedies(qwen2(), spread, 1 << 20, A100)}
    assert "--cp 4" in flags
    assert "--cp 8" not in flags, "28 heads"


def test_rows_of_one_forward_are_whole_and_no_more_than_there_are() -> None:
    assert [rows_together(1000, n, 5) for n in (1, 999, 1000, 2999, 3000, 99_000)] == [1, 1, 1, 2, 3, 5]


def test_every_part_of_the_shards_is_the_whole_over_the_devices() -> None:
    """ZeRO 3 in mixed precision: sixteen bytes a parameter over all devices, or on the host."""
    parts, _, host = memory(qwen2(), EIGHT, 8192, runtime=0)
    assert 8 * (parts["parameters"] + parts["gradients"] + parts["optimizer"]) == 16 * qwen2().parameters
    parts, _, moved = memory(qwen2(), replace(EIGHT, offload=True), 8192, runtime=0)
    assert parts["parameters"] + parts["gradients"] + parts["optimizer"] + host == 0
    assert moved == 2 * qwen2().parameters


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="mamba models are not supported"):
        read_shape({"model_type": "mamba"}, where="m")
    with pytest.raises(InputError, match="lacks 'vocab_size'"):
        read_shape({k: v for k, v in LLAMA2_7B.items() if k != "vocab_size"}, where="m")


def plan(*args: object) -> Any:
    return run("plan", "extend-lm", "--model", QWEN2_7B, *args)


def test_the_command_needs_no_torch_and_refuses_what_cannot_fit() -> None:
    eight = ("--world", 8, "--seq-len", 224_000, "--device-memory", "80GiB")
    command = [sys.executable, "-X", "importtime", "-m", "lvctx", "plan", "extend-lm", "--model", QWEN2_7B, *eight]
    fits = subprocess.run([*map(str, command), "--cp", "8"], capture_output=True, text=True, timeout=120)
    assert fits.returncode == 0, fits.stderr
    assert not re.search(r"\| +torch$", fits.stderr, re.M)
    found = json.loads(fits.stdout)
    assert found["fits"]
    assert found["peak_bytes"] <= sum(found["bytes"].values())
    too_long = plan(*eight, "--cp", 1)
    assert too_long.exit_code == 3
    assert "it fits with --cp 2" in too_long.stderr.splitlines()[-1]
    assert plan(*eight, "--cp", 3).exit_code == 2
    assert plan(*eight, "--cp", 8, "--cp-kind", "ulysses").exit_code == 3, "28 heads"
    assert json.loads(plan(*eight, "--cp", 8, "--cp-kind", "both").stdout)["cp_kind"] == "both"
    assert plan("--seq-len", 1024, "--device-memory", "lots").exit_code == 2


def test_rows_that_share_a_forward_share_its_memory() -> None:
    """Activations grow with the tokens of a forward: four rows of 1,024 as one of 4,096; the model does not."""
    one, four, long = (
        json.loads(plan("--seq-len", length, "--batch-tokens", 4096, "--micro-tokens", tokens, "--lora", 8).stdout)
        for length, tokens in ((1024, 1), (1024, 4096), (4096, 1))
    )
    assert four["bytes"]["activations"] == 4 * one["bytes"]["activations"] == long["bytes"]["activations"]
    assert four["bytes"]["parameters"] == one["bytes"]["parameters"]


def test_the_tables_of_the_documentation_are_what_plan_predicts(tmp_path: Path) -> None:
    (tmp_path / "qwen3.json").write_text(json.dumps(QWEN3_8B))
    host = {"offload_activations": True}
    columns: list[dict[str, Any]] = [{}, host, {**host, "offload": True}, {"lora": 16}]
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), re.M)[:6]
    assert [int(devices) for devices, _ in rows] == [1, 2, 4, 8, 16, 32]
    for devices, cells in rows:
        found = []
        for model in (QWEN2_7B, tmp_path / "qwen3.json"):
            spread: dict[str, Any] = {"seq_len": 1024, "world": int(devices), "cp": int(devices), "device": "h100"}
            found += [predict(PlanConfig(model=str(model), **spread, **options))["longest"] for options in columns]
        assert [cell.strip() for cell in cells.split("|")] == [f"{n:,}" if n else "–" for n in found]
        if int(devices) == 8:
            assert f"| {found[0]:,} by `plan`" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("choice", ["auto", "none", "layers", "tiles"])
@pytest.mark.parametrize("lora", [0, 8])
@pytest.mark.parametrize(("length", "gib"), [(4096, 24), (4096, 120), (1000, 40), (16_384, 80), (40_000, 80)])
def test_by_default_a_gpu_takes_as_many_rows_at_once_as_cost_no_recomputation(
    choice: Any, lora: int, length: int, gib: int
) -> None:
    """Every number of rows is tried; those of a step over two devices are 12 each."""
    given: dict[str, Any] = {"seq_len": length, "world": 2, "batch_tokens": 24 * length, "lora": lora}
    given |= {"model": str(QWEN2_7B), "device": "h100", "device_memory": gib << 30, "checkpoint_activations": choice}
    tried = [predict(PlanConfig(**given, micro_tokens=n * length)) for n in range(1, 13)]
    good = [
        found["rows_a_forward"]
        for found in tried
        if found["recomputation"] == tried[0]["recomputation"]
        and found["peak_bytes"] <= 0.9 * (gib << 30)
        and found["rows_a_forward"] * length <= 32_768
    ]
    assert predict(PlanConfig(**given))["rows_a_forward"] == max(good, default=1)


def test_rows_at_once_by_hand() -> None:
    """32,768 tokens on a GPU, 4,096 on a CPU, never more than a device's rows of a step, or as given."""
    small: dict[str, Any] = {"model": str(QWEN2_7B), "lora": 1, "seq_len": 1024, "device_memory": 1 << 50}

    def rows(**more: Any) -> int:
        return int(predict(PlanConfig(**{**small, **more}))["rows_a_forward"])

    assert [rows(device=device) for device in ("h100", "a100", "cpu")] == [32, 32, 4]
    assert rows(batch_tokens=10 * 1024) == rows(batch_tokens=40 * 1024, world=4) == 10
    assert rows(seq_len=40_000) == rows(seq_len=20_000, batch_tokens=20_000) == 1
    assert rows(micro_tokens=3 * 1024) == 3
    assert rows(micro_tokens=1 << 17, device="cpu") == rows(micro_tokens=1 << 17) == 128


def test_extend_lm_takes_the_rows_that_plan_predicts(
    tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch, rows_read: list[int]
) -> None:
    """On a GPU whose memory keeps every layer of five rows, but not of six; under two ranks the smaller GPU decides."""
    (tmp_path / "text.txt").write_text(" ".join(f"Fox {i} jumps over dog {7 * i}." for i in range(200)))
    pack = ("pack-text", tmp_path / "text.txt", "--tokenizer", tiny_lm, "--seq-len", 64, "--keep-short", 1)
    done = run(*pack, "-o", tmp_path / "packed")
    assert done.exit_code == 0, done.output
    given: dict[str, Any] = {"model": str(tiny_lm), "seq_len": 64, "batch_tokens": 12 * 64, "device": "h100"}

    def peak(rows: int) -> int:
        kept = predict(PlanConfig(**given, micro_tokens=64 * rows, checkpoint_activations="none"))
        return int(kept["peak_bytes"])

    memory_bytes = (peak(5) + peak(6)) // 2 * 10 // 9
    monkeypatch.setattr("lvctx.training.plan._this_device", lambda device, world: ("h100", memory_bytes))
    command = ("extend-lm", "--model", tiny_lm, "--data", tmp_path / "packed", "--steps", 1, "--batch-tokens", 12 * 64)
    assert run(*command, "--device", "cpu", "-o", tmp_path / "out").exit_code == 0
    assert rows_read == [5, 5, 2]
    stated = ("--seq-len", 64, "--batch-tokens", 12 * 64, "--device", "h100")
    done = run("plan", "extend-lm", "--model", tiny_lm, *stated)
    assert json.loads(done.stdout)["rows_a_forward"] == 12, "80 GiB"
    assert "12 x 64 tokens" in done.stderr
    assert predict(PlanConfig(**given, device_memory=memory_bytes))["rows_a_forward"] == 5

    job = resolve_extend(ExtendConfig(model=str(tiny_lm), data=tmp_path / "packed", batch_tokens=12 * 64, out=tmp_path))
    ranks: Any = SimpleNamespace(size=2, dp=2, gather=lambda rows: [rows, 3])
    assert ExtendTask(job)._rows_of_a_forward(ranks, ParallelConfig()) == 3
    assert ExtendTask(job)._rows_of_a_forward(ranks, ParallelConfig(micro_tokens=128)) == 2
