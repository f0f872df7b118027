"""The VLM is stock LlavaOnevision: same tokens, same logits, on the saved directory."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.refusals import refused
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlavaOnevisionForConditionalGeneration

from lvctx.errors import InputError
from lvctx.models.card import CARD, write_section
from lvctx.models.loading import load_config, load_model, load_tokenizer, resolve_model
from lvctx.models.loss import IGNORED, shift_labels, token_loss
from lvctx.models.saving import save_model, save_tokenizer
from lvctx.models.vlm_assembly import (
    assemble,
    chat_ids,
    embed_frames,
    frame_features,
    newline_embedding,
    newline_id,
    save_vlm,
    tokens_per_frame,
)


@pytest.fixture(scope="module")
def vlm_dir(tiny_lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vlm")
    tokenizer = load_tokenizer(tiny_lm)
    tower = CLIPVisionModel.from_pretrained(tiny_tower).eval()
    vlm = assemble(load_model(tiny_lm), tower, tokenizer, where=tiny_lm, seed=0)
    save_vlm(vlm, tokenizer, tiny_tower, out)
    return out


def test_visual_path_equals_the_stock_video_path(vlm_dir: Path) -> None:
    """Tower -> projector -> 2x2 pool -> "\\n" on the saved directory: token for token and logit for logit."""
    vlm, tokenizer = load_model(vlm_dir), load_tokenizer(vlm_dir)
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(vlm_dir).eval()
    torch.manual_seed(0)
    pixels = torch.randn(5, 3, 48, 48)
    before, after = chat_ids(tokenizer, "What color is the star?")
    visual = 5 * tokens_per_frame(vlm.config) + 1
    ids = torch.tensor([before + [stock.config.video_token_id] * visual + after])
    embed = vlm.get_input_embeddings()
    with torch.no_grad():
        expected = stock(input_ids=ids, pixel_values_videos=pixels[None]).logits
        block = torch.cat([embed_frames(vlm, frame_features(vlm, pixels)), newline_embedding(vlm)])
        assert len(block) == visual
        embeds = torch.cat([embed(torch.tensor(before)), block, embed(torch.tensor(after))])[None]
        ours = vlm.lm_head(vlm.model.language_model(inputs_embeds=embeds).last_hidden_state)
    assert torch.equal(ours, expected)


def test_pool_is_the_mean_of_two_by_two(vlm_dir: Path) -> None:
    vlm = load_model(vlm_dir)
    torch.manual_seed(1)
    features = torch.randn(2, 16, 32)
    projected = vlm.model.multi_modal_projector(features).view(2, 2, 2, 2, 2, -1)  # F, rows, 2, columns, 2, E
    torch.testing.assert_close(embed_frames(vlm, features), projected.mean((2, 4)).flatten(0, 2), atol=1e-6, rtol=1e-5)


def test_newline_is_the_language_models_own(vlm_dir: Path) -> None:
    vlm, tokenizer = load_model(vlm_dir), load_tokenizer(vlm_dir)
    assert torch.equal(newline_embedding(vlm)[0], vlm.get_input_embeddings().weight[newline_id(tokenizer)])


def test_chat_is_longvas_prompt_with_the_newline_inside_the_visual_block(vlm_dir: Path) -> None:
    tokenizer = load_tokenizer(vlm_dir)
    before, after = chat_ids(tokenizer, "Why?")
    assert tokenizer.decode(before).endswith("<|im_start|>user\n")
    assert tokenizer.decode(after) == "Why?<|im_end|>\n<|im_start|>assistant\n"


def test_template_takes_parts_as_processors_send_them(vlm_dir: Path) -> None:
    tokenizer = load_tokenizer(vlm_dir)
    parts = [
        {"type": "video"},
        {"type": "audio", "audio": "a.wav"},
        {"type": "image"},
        {"type": "text", "text": "Why?"},
    ]
    in_parts, plain = ([{"role": "user", "content": content}] for content in (parts, "<video><image>Why?"))
    assert tokenizer.apply_chat_template(in_parts, tokenize=False) == tokenizer.apply_chat_template(
        plain, tokenize=False
    )


def test_grown_rows_are_the_mean_and_the_rest_is_untouched(tiny_lm: Path, vlm_dir: Path) -> None:
    old = load_model(tiny_lm).get_input_embeddings().weight
    new = load_model(vlm_dir).get_input_embeddings().weight
    assert torch.equal(new[: len(old)], old)
    torch.testing.assert_close(new[len(old)], old.mean(0))


def test_a_frame_of_another_tower_is_refused(vlm_dir: Path) -> None:
    with pytest.raises(InputError, match="own tower"):
        embed_frames(load_model(vlm_dir), torch.zeros(1, 16, 31))


def test_saved_twice_same_bytes(tiny_lm: Path, tiny_tower: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        tokenizer = load_tokenizer(tiny_lm)
        tower = CLIPVisionModel.from_pretrained(tiny_tower).eval()
        vlm = assemble(load_model(tiny_lm), tower, tokenizer, where=tiny_lm, seed=3)
        save_vlm(vlm, tokenizer, tiny_tower, tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_how_a_tokenizer_was_loaded_is_not_saved(tiny_lm: Path, tmp_path: Path) -> None:
    """transformers stores its arguments, one of which HF_HUB_OFFLINE decides."""
    for name, offline in (("on", False), ("off", True)):
        tokenizer = AutoTokenizer.from_pretrained(tiny_lm, local_files_only=offline)
        save_tokenizer(tokenizer, load_config(tiny_lm), tmp_path / name)
    first, second = ((tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("on", "off"))
    assert first == second
    assert b"local" not in first


def test_a_card_in_another_encoding_keeps_its_bytes(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"caf\xe9\n")
    write_section(tmp_path, "Positions", "Scaled.\n")
    assert (tmp_path / CARD).read_bytes() == b"caf\xe9\n\n## Positions\n\nScaled.\n"


def test_weights_of_another_run_do_not_stay_beside_new_ones(tiny_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm"
    model = load_model(tiny_lm)
    save_model(model, load_tokenizer(tiny_lm), out)
    stale = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    for name in stale:
        (out / name).write_text("of another run")
    (out / "adapter").mkdir()
    (out / "adapter" / "adapter_model.safetensors").write_text("not weights")
    save_model(model, load_tokenizer(tiny_lm), out)
    assert not any((out / name).exists() for name in stale)
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert all(torch.equal(a, b) for a, b in zip(load_model(out).parameters(), model.parameters(), strict=True))


def test_missing_shard_is_named(tiny_lm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_lm / "config.json").read_text())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(InputError, match=r"missing model-00002-of-00002\.safetensors"):
        resolve_model(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all"])
def test_unknown_model_is_one_line(name: str) -> None:
    with refused(InputError, name):
        resolve_model(name)


def test_broken_weights_are_one_line(tiny_lm: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_lm / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all")
    with refused(InputError, "model.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_loss_is_the_float32_sum_of_cross_entropies_and_its_gradient(trained: tuple[bool, bool]) -> None:
    """Against torch's own cross-entropy on full logits in float64, with ignored labels and an uneven last chunk."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 8), 20 * torch.randn(50, 8)
    labels = torch.randint(0, 50, (37,))
    labels[::5] = IGNORED
    ours = [t.clone().requires_grad_(on) for t, on in zip((hidden, weight), trained, strict=True)]
    full = [t.double().requires_grad_(on) for t, on in zip((hidden, weight), trained, strict=True)]
    total, count = token_loss(ours[0], ours[1], labels, chunk=7)
    expected = F.cross_entropy(full[0] @ full[1].T, labels, ignore_index=IGNORED, reduction="sum")
    (total * 0.37).backward()
    (expected * 0.37).backward()
    assert total.dtype == torch.float32
    assert count == int((labels != IGNORED).sum())
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, full, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


def test_loss_under_autocast_has_float32_gradients_of_a_float32_head() -> None:
    """The sums over chunks are float32: closer to float64 than bfloat16 sums could be."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 32), torch.randn(64, 32)
    labels = torch.randint(0, 64, (512,))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    full = [hidden.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = token_loss(ours[0], ours[1], labels, chunk=4)
    total.backward()
    F.cross_entropy(full[0] @ full[1].T, labels, reduction="sum").backward()
    for a, b in zip(ours, full, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == torch.float32
        assert (a.grad.double() - b.grad).norm() / b.grad.norm() < 8e-3


def test_logits_exist_for_a_chunk_at_a_time_forward_and_backward() -> None:
    """Every tensor that any operation makes is looked at; hidden states' gradients are made once, not once a chunk.

    One chunk's logits are free when the next one's are computed.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []
    logits: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    together: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else (made,):
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel())
                    if tensor.numel() == 64 * 1000:
                        logits.add(tensor.untyped_storage())
            together.append(len(logits))
            return made

    hidden = torch.randn(4096, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    with Watch():
        total, _ = token_loss(hidden, weight, torch.randint(0, 1000, (4096,)), chunk=64)
        total.backward()
    assert max(sizes) == 64 * 1000
    assert max(together) == 1
    assert sum(size == 4096 * 4 for size in sizes) < 20


def test_a_rank_without_counted_tokens_has_a_loss_of_nothing() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    total, count = token_loss(hidden, weight, torch.full((5,), IGNORED))
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_labels_are_the_next_tokens() -> None:
    assert shift_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORED]]


def test_siglip_tower_is_read_at_its_last_layer_with_every_patch(tiny_lm: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    tokenizer = load_tokenizer(tiny_lm)
    vlm = assemble(load_model(tiny_lm), SiglipVisionModel(config).eval(), tokenizer, where=tiny_lm, seed=0)
    assert frame_features(vlm, torch.zeros(1, 3, 48, 48)).shape == (1, 16, 32)
    assert CLIPVisionConfig.model_type.startswith("clip")
