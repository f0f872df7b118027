"""M-RoPE++ in checkpoints: stock transformers computes the paper's formula from config.json alone."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import mrope_models
from support.refusals import refused
from test_cli import fails, lvctx

from lvctx.errors import InputError, UsageError
from lvctx.models.side_files import with_rope
from lvctx.rope.mrope_pp import MropeSpec, betas, inv_freq
from lvctx.rope.runtimes import llama_cpp, sglang, vllm
from lvctx.training.mrope_checkpoint import read_checkpoint, resolve_mrope, run_mrope
from lvctx.training.mrope_config import MropeConfig
from lvctx.training.mrope_verify import verify

QWEN2 = {"head_dim": 128, "theta": 1e6, "sections": (16, 24, 24)}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mrope_models.save("qwen2_vl", tmp_path_factory.mktemp("qwen2"))


def paper(j: int, *, s: float, length: int, ramp: str, base: float = 1e6) -> float:
    """GIRAFFE's piecewise function on Qwen2-VL's 64 channels, in Python floats; `ntk` is the released code's."""
    theta = base ** (-j / 64)
    if j < 16:
        return theta
    if ramp == "ntk":
        return float((base * ((s * length - 1) / (length - 1)) ** (128 / 126)) ** (-j / 64))
    if j >= 40:
        return theta / s
    turns = [length * base ** (-i / 64) / (2 * math.pi) for i in (15, j, 39)]
    gamma = (39 - j) / 24 if ramp == "index" else (turns[1] - turns[2]) / (turns[0] - turns[2])
    return theta * (1 / s + (1 - 1 / s) * gamma)


@pytest.mark.parametrize("ramp", ["index", "wavelength", "ntk"])
@pytest.mark.parametrize(("s", "length"), [(1.0, 32_768), (4.0, 32_768), (8.0, 16_384), (2.5, 32_768)])
def test_the_formula(ramp: Any, s: float, length: int) -> None:
    spec = MropeSpec(**QWEN2, factor=s, original=length, ramp=ramp)  # type: ignore[arg-type]
    wanted = torch.tensor([paper(j, s=s, length=length, ramp=ramp) for j in range(64)], dtype=torch.float64)
    assert torch.allclose(inv_freq(spec), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("length", "golden"), [(32_768, (204.6539, 1.150854)), (16_384, (102.3270, 0.575427))])
def test_turns_at_the_ends_of_height(length: int, golden: tuple[float, float]) -> None:
    assert betas(MropeSpec(**QWEN2, factor=4, original=length)) == pytest.approx(golden, rel=1e-6)  # type: ignore[arg-type]


def extend(model: Path, out: Path, **changed: Any) -> Path:
    force = changed.pop("force", False)
    config = MropeConfig(model=str(model), out=out, **({"scale": 4.0} | changed))
    run_mrope(resolve_mrope(config, force=force), out, resume="auto", force=False)
    return out


@pytest.mark.parametrize("ramp", ["index", "wavelength", "ntk"])
@pytest.mark.parametrize("s", [4.0, 8.0])
def test_stock_transformers_computes_it(ramp: Any, s: float, qwen2: Path, tmp_path: Path) -> None:
    """The loaded model itself, all 64 channels, and attention as it was."""
    from transformers import AutoModelForImageTextToText

    out = extend(qwen2, tmp_path / "out", ramp=ramp, scale=s)
    rotary = AutoModelForImageTextToText.from_pretrained(out).model.language_model.rotary_emb
    for j, frequency in enumerate(rotary.inv_freq.double().tolist()):
        assert frequency == pytest.approx(paper(j, s=s, length=32_768, ramp=ramp), rel=1e-6), j
    assert rotary.attention_scaling == 1.0
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == 32_768 * s
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_method_on_every_model(kind: str, tmp_path: Path) -> None:
    model = mrope_models.save(kind, tmp_path / "model")
    for method in ("mrope++", "pi", "ntk", "yarn", "none", None):
        if kind == "qwen3_vl" and method == "mrope++":
            continue
        verified = verify(extend(model, tmp_path / str(method), method=method))
        assert verified.error is not None
        assert verified.error < 1e-6, method
        slowest = verified.channels[-1].wavelength / verified.channels[-1].plain
        assert slowest == pytest.approx(1.0 if method == "none" else 4.0, rel=1e-3), method
    axes = "".join(channel.axis for channel in verify(model).channels)
    assert axes == ("thw" * 20 + "tttt" if kind == "qwen3_vl" else "t" * 16 + "h" * 24 + "w" * 24)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_axes_are_those_that_transformers_rotates_by(kind: str) -> None:
    """One axis at a time at position 1: the channels whose sine is not 0."""
    model = mrope_models.skeleton(kind)
    rotary = model.language_model.rotary_emb
    if not hasattr(rotary, "recomposition_frequencies"):
        pytest.skip("this transformers mixes the axes elsewhere")
    found = ["?"] * 64
    for a, axis in enumerate("thw"):
        positions = torch.zeros(3, 1, 1, dtype=torch.int64)
        positions[a] = 1
        _, sin = rotary(torch.zeros(1), positions)
        for j in range(64):
            if sin[0, 0, j] != 0:
                assert found[j] == "?"
                found[j] = axis
    from lvctx.rope.mrope import Mrope

    sections = tuple(model.config.text_config.rope_parameters["mrope_section"])
    assert "".join(found) == Mrope(head_dim=128, theta=1e6, sections=sections, interleaved=kind == "qwen3_vl").axes


def test_weights_are_links_and_nothing_else_changes(qwen2: Path, tmp_path: Path) -> None:
    (qwen2 / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    out = extend(qwen2, tmp_path / "out")
    assert os.path.samefile(qwen2 / "model.safetensors", out / "model.safetensors")
    before, after = (json.loads((d / "config.json").read_text()) for d in (qwen2, out))
    for text in (before["text_config"], after["text_config"]):
        del text["rope_parameters"], text["max_position_embeddings"]
    assert before == after
    readme = (out / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in readme
    assert "# A model" not in readme, "the text of another model"
    for name in ("vllm.json", "sglang", "llama.cpp.txt"):
        assert readme.count(f"DIR/{name}") == 1
    assert (out / "sglang" / "model.safetensors").samefile(qwen2 / "model.safetensors")
    (qwen2 / "README.md").unlink()


def test_a_copy_where_links_are_not_possible(qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    out = extend(qwen2, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (qwen2 / "model.safetensors").read_bytes()
    assert not os.path.samefile(qwen2 / "model.safetensors", out / "model.safetensors")


def test_flat_configurations_keep_their_style() -> None:
    """As the released Qwen2-VL has it: no text_config, rope_scaling, the base beside it."""
    raw = {"model_type": "qwen2_vl", "rope_theta": 1e6, "max_position_embeddings": 32_768, "hidden_size": 8}
    raw["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    new = with_rope(raw, {"rope_type": "yarn", "rope_theta": 2e6}, 131_072)
    assert new == raw | {
        "rope_theta": 2e6,
        "max_position_embeddings": 131_072,
        "rope_scaling": {"rope_type": "yarn", "rope_theta": 2e6},
    }


def test_a_flat_checkpoint_loads_the_same(qwen2: Path, tmp_path: Path) -> None:
    """The released layout, stretched, computes the same as ours."""
    raw = json.loads((qwen2 / "config.json").read_text())
    text = raw.pop("text_config")
    del text["model_type"], text["rope_parameters"]
    flat = {**text, **raw, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    model = tmp_path / "flat"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(flat))
    os.link(qwen2 / "model.safetensors", model / "model.safetensors")
    out = extend(model, tmp_path / "out")
    assert "text_config" not in json.loads((out / "config.json").read_text())
    verified = verify(out)
    assert verified.error is not None
    assert verified.error < 1e-6


def yarn_elsewhere(rope: dict[str, Any], *, length: int) -> tuple[list[float], float]:
    """YaRN as vLLM, SGLang and llama.cpp have it: ramp ends rounded outwards, own attention times attn_factor."""
    base, s = rope["rope_theta"], rope["factor"]
    at = [
        128 * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(base))
        for beta in (rope["beta_fast"], rope["beta_slow"])
    ]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), 127)
    kept = [1 - min(max((j - low) / (high - low), 0), 1) for j in range(64)]
    theta = [base ** (-j / 64) for j in range(64)]
    return [t * k + t / s * (1 - k) for t, k in zip(theta, kept, strict=True)], (0.1 * math.log(s) + 1) * rope[
        "attn_factor"
    ]


@pytest.mark.parametrize(("s", "attn"), [(4.0, 0.878249), (8.0, 0.827853)])
def test_side_files_give_other_runtimes_the_same(s: float, attn: float, qwen2: Path, tmp_path: Path) -> None:
    out = extend(qwen2, tmp_path / "out", scale=s)
    wanted = [paper(j, s=s, length=32_768, ramp="index") for j in range(64)]
    overrides = json.loads((out / "vllm.json").read_text())["text_config"]
    frequencies, attention = yarn_elsewhere(overrides["rope_parameters"], length=4 * 32_768)
    assert frequencies == pytest.approx(wanted, rel=1e-9)
    assert attention == pytest.approx(1.0)
    assert overrides["max_position_embeddings"] == 32_768 * s
    rope = json.loads((out / "sglang" / "config.json").read_text())["text_config"]["rope_parameters"]
    frequencies, attention = yarn_elsewhere(rope, length=32_768)
    assert frequencies == pytest.approx(wanted, rel=1e-9)
    assert (attention, rope["attn_factor"]) == pytest.approx((1.0, attn), rel=1e-6)
    words = (out / "llama.cpp.txt").read_text().split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    told = {"rope_theta": 1e6, "factor": float(flags["--rope-scale"]), "beta_fast": float(flags["--yarn-beta-fast"])}
    told |= {"beta_slow": float(flags["--yarn-beta-slow"]), "attn_factor": float(flags["--override-kv"].split(":")[1])}
    frequencies, attention = yarn_elsewhere(told, length=int(flags["--yarn-orig-ctx"]))
    assert frequencies == pytest.approx(wanted, rel=1e-9)
    assert attention == pytest.approx(1.0)


def test_what_other_runtimes_cannot_do_is_reported(qwen2: Path, tmp_path: Path) -> None:
    out = extend(qwen2, tmp_path / "out", ramp="wavelength")
    rope = json.loads((out / "config.json").read_text())["text_config"]["rope_parameters"]
    assert vllm(rope, model_type="qwen2_vl", context=1) is sglang(rope) is None
    assert llama_cpp(rope, model_type="qwen2_vl", context=1) is None
    assert "vLLM: cannot" in (out / "README.md").read_text()
    assert not (out / "vllm.json").exists()


def test_bad_input(qwen2: Path, tiny_lm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="less than 1"):
        extend(qwen2, tmp_path / "x", scale=0.5)
    with refused(InputError, str(tiny_lm)):
        extend(tiny_lm, tmp_path / "x")
    out = extend(qwen2, tmp_path / "out")
    with refused(InputError, "out"):
        extend(out, tmp_path / "x")
    again = extend(out, tmp_path / "again", scale=8.0, force=True)
    assert json.loads((again / "config.json").read_text())["text_config"]["max_position_embeddings"] == 262_144
    assert verify(again).holds
    raw = json.loads((qwen2 / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    os.link(qwen2 / "model.safetensors", broken / "model.safetensors")
    raw["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 23]
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"\[16, 24, 23\] does not sum to 64"):
        read_checkpoint(broken)
    raw["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    del raw["text_config"]["max_position_embeddings"]
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="--original-length"):
        extend(broken, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_no_mrope_pp_for_qwen3_and_the_reason(tmp_path: Path) -> None:
    model = mrope_models.save("qwen3_vl", tmp_path / "model")
    with pytest.raises(UsageError, match="alternate over all frequencies"):
        extend(model, tmp_path / "x", method="mrope++")
    job = resolve_mrope(MropeConfig(model=str(model), out=tmp_path / "x", scale=2))
    assert job.scaling.method == "yarn"
    assert "alternate over all frequencies" in job.note


def test_qwen25_does_not_state_its_length(tmp_path: Path) -> None:
    model = mrope_models.save("qwen2_5_vl", tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = 128_000
    (model / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"allows 128000 positions.*32768"):
        extend(model, tmp_path / "x")
    assert verify(extend(model, tmp_path / "out", original_length=32_768)).holds


def test_the_command(qwen2: Path, tmp_path: Path) -> None:
    out, curves = tmp_path / "out", tmp_path / "curves.png"
    done = lvctx("mrope-extend", "--model", qwen2, "--scale", 4, "-o", out, "--verify", "--plot", curves)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["method"], row["context"], row["schema"]) == ("mrope++", 131_072, "lvctx.model/1")
    assert row["largest_relative_error"] < 1e-6
    assert len([line for line in done.stderr.splitlines() if " t " in line or " h " in line or " w " in line]) == 64
    assert curves.read_bytes().startswith(b"\x89PNG")
    before = (out / "config.json").stat().st_mtime_ns
    assert lvctx("mrope-extend", "--model", qwen2, "--scale", 4, "-o", out).returncode == 0
    assert (out / "config.json").stat().st_mtime_ns == before
    fails(3, lvctx("mrope-extend", "--model", qwen2, "--scale", 8, "-o", out), "factor: 4.0 -> 8.0")
    fails(2, lvctx("mrope-extend", "--model", qwen2, "--scale", 8, "-o", qwen2), "-o is the model's own directory")
