"""A tower is the same wherever it is stored, and its features are those of stock transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.refusals import refused
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from lvctx.errors import InputError
from lvctx.models.image_processing import crops_frames
from lvctx.models.vision_encoder import TowerFiles, load_tower, load_vision_model

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
VISION = {**SHAPE, "num_hidden_layers": 3, "image_size": 24, "patch_size": 6}
TEXT = {**SHAPE, "num_hidden_layers": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}


def vlm_of(tower: Any, *, layer: int, strategy: str) -> Any:
    config = LlavaOnevisionConfig(
        vision_config=tower.config,
        text_config=Qwen2Config(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    vlm = LlavaOnevisionForConditionalGeneration(config)
    vlm.model.vision_tower = tower
    return vlm


@pytest.fixture(scope="module")
def towers(tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Every kind of directory with its vision model as stock transformers has it."""
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
    siglip = SiglipVisionModel(SiglipVisionConfig(**VISION))
    whole_clip = CLIPModel(
        CLIPConfig(text_config=CLIPTextConfig(**TEXT).to_dict(), vision_config=clip.config.to_dict())
    )
    whole_siglip = SiglipModel(
        SiglipConfig(text_config=SiglipTextConfig(**TEXT).to_dict(), vision_config=siglip.config.to_dict())
    )
    found = {}
    for name, model, vision in (
        ("clip", clip, clip),
        ("siglip", siglip, siglip),
        ("whole clip", whole_clip, whole_clip.vision_model),
        ("whole siglip", whole_siglip, whole_siglip.vision_model),
        ("clip vlm", vlm_of(clip, layer=-2, strategy="default"), clip),
        ("clip vlm first layer", vlm_of(clip, layer=1, strategy="full"), clip),
        ("siglip vlm", vlm_of(siglip, layer=-1, strategy="full"), siglip),
    ):
        path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        shard = {"max_shard_size": "30KB"} if "vlm" in name else {}
        model.save_pretrained(path, **shard)
        shutil.copy(tiny_tower / "preprocessor_config.json", path)
        found[name] = path, vision.eval()
    return found


KINDS = ["clip", "siglip", "whole clip", "whole siglip", "clip vlm", "clip vlm first layer", "siglip vlm"]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_selected_hidden_state(kind: str, towers: dict[str, tuple[Path, Any]]) -> None:
    path, stock = towers[kind]
    tower = load_tower(path, dtype=torch.float32)
    pixels = torch.randn(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    layer, drop = {"clip vlm first layer": (1, False)}.get(kind, (-2, True) if "clip" in kind else (-1, False))
    if "siglip" in kind:
        layer, drop = -1, False
    with torch.inference_mode():
        expected = stock(pixels, output_hidden_states=True).hidden_states[layer]
    expected = expected[:, 1:] if drop else expected
    features = tower.encode(pixels, batch=2)
    assert features.shape == (5, tower.patches_per_frame, tower.width) == expected.shape
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert tower.layer == layer


def test_one_tower_has_one_fingerprint(towers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    prints = {kind: TowerFiles.find(path).fingerprint for kind, (path, _) in towers.items()}
    assert prints["clip"] == prints["clip vlm"], "the same weights, layer and pixels"
    assert prints["siglip"] == prints["siglip vlm"]
    assert len({prints[k] for k in ("clip", "clip vlm first layer", "siglip", "whole clip", "whole siglip")}) == 5
    trained = CLIPVisionModel.from_pretrained(towers["clip"][0])
    with torch.no_grad():
        trained.embeddings.class_embedding[0] += 1
    trained.save_pretrained(tmp_path)
    shutil.copy(towers["clip"][0] / "preprocessor_config.json", tmp_path)
    assert TowerFiles.find(tmp_path).fingerprint != prints["clip"]


def test_old_names_in_a_checkpoint(towers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = towers["clip"][0]
    shutil.copytree(path, tmp_path / "old")
    weights = {f"vision_model.{k}": v for k, v in load_file(path / "model.safetensors").items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, tmp_path / "old" / "model.safetensors")
    old, new = load_tower(tmp_path / "old", dtype=torch.float32), load_tower(path, dtype=torch.float32)
    pixels = torch.randn(1, 3, 24, 24)
    assert torch.equal(old.encode(pixels), new.encode(pixels))
    assert old.fingerprint == new.fingerprint


def test_the_whole_model_to_build_on(towers: dict[str, tuple[Path, Any]]) -> None:
    for kind in ("clip", "clip vlm", "siglip vlm"):
        path, stock = towers[kind]
        model = load_vision_model(path, dtype=torch.float32)
        assert type(model) is type(stock)
        ours = dict(model.named_parameters())
        assert ours.keys() == dict(stock.named_parameters()).keys()
        assert all(torch.equal(p, ours[name]) for name, p in stock.named_parameters())


def test_what_is_no_tower_is_refused(towers: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path = towers["clip"][0]
    with refused(InputError, "/nowhere"):
        TowerFiles.find("/nowhere")
    Qwen2Config(**TEXT).save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").touch()
    with refused(InputError, "lm"):
        TowerFiles.find(tmp_path / "lm")
    shutil.copytree(path, tmp_path / "other")
    CLIPVisionConfig(**{**VISION, "num_hidden_layers": 4}).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="lacks encoder"):
        load_tower(tmp_path / "other", dtype=torch.float32)
    shutil.copytree(path, tmp_path / "cut")
    raw = (path / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(raw[:-10])
    with refused(InputError, "cut/model.safetensors"):
        load_tower(tmp_path / "cut", dtype=torch.float32)


def test_the_same_as_the_vlm_sees(towers: dict[str, tuple[Path, Any]]) -> None:
    from lvctx.models.vlm_assembly import frame_features

    for kind in ("clip vlm", "siglip vlm"):
        path = towers[kind][0]
        vlm = LlavaOnevisionForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        pixels = torch.randn(2, 3, 24, 24)
        with torch.inference_mode():
            assert torch.equal(load_tower(path, dtype=torch.float32).encode(pixels), frame_features(vlm, pixels))


@pytest.mark.parametrize(
    ("files", "crops"),
    [
        ({}, False),
        ({"preprocessor_config.json": {"size": 384}}, False),
        ({"preprocessor_config.json": {"size": 384}, "video_preprocessor_config.json": {"do_center_crop": True}}, True),
        (
            {"processor_config.json": {"video_processor": {"size": 9}, "image_processor": {"do_center_crop": True}}},
            False,
        ),
    ],
)
def test_a_frame_becomes_a_square_as_the_models_processor_makes_it(
    tmp_path: Path, tiny_tower: Path, files: dict[str, Any], crops: bool
) -> None:
    """Stock LlavaOnevision resizes both sides; what `align` writes crops the centre, and so do towers alone."""
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert crops_frames(tmp_path) == crops
    assert TowerFiles.find(tiny_tower).frame_mode == "crop"
