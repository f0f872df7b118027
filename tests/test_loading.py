"""A model is loaded completely or refused: every missing, unknown or differing tensor is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import broken, mrope_models
from support.refusals import refused
from transformers import AutoConfig, AutoModelForCausalLM, CLIPConfig, CLIPModel, LlamaForCausalLM, SiglipVisionConfig

from lvctx.artifacts.describe import describe
from lvctx.artifacts.weights import read_weights, shard_names
from lvctx.errors import InputError, MissingError, library_errors
from lvctx.models.adapter import load_adapter, save_adapter
from lvctx.models.chat_template import chat_encoder
from lvctx.models.loading import load_config, load_model, load_tokenizer, resolve_model
from lvctx.models.lora import ATTENTION, add_lora
from lvctx.models.vision_encoder import load_tower, load_vision_model

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.save_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.save_lm(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def vlm(lm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return broken.save_vlm(lm, tiny_tower, tmp_path_factory.mktemp("vlm"))


def changed(source: Path, out: Path, change: Callable[[Tensors], Any], **config: Any) -> Path:
    """A copy of a model with other tensors, and other values in config.json."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    broken.clone(source, out)
    (out / "model.safetensors").unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return broken.edit(out, **config)


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def nothing(tensors: Tensors) -> None:
    pass


def misname(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.upproj.weight"] = tensors.pop(UP)


def reshape(tensors: Tensors) -> None:
    tensors[UP] = torch.zeros(3, 3)


DAMAGE = [
    (drop(UP), {}, f"lacks {UP}"),
    (misname, {}, f"lacks {UP}; holds model.layers.1.mlp.upproj.weight"),
    (reshape, {}, rf"{UP}: \[3, 3\], but the configuration has \[128, 64\]"),
    (nothing, {"num_hidden_layers": 1}, "holds model.layers.1.input_layernorm.weight.* and 1 more"),
    (nothing, {"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight.* and 1 more"),
    (nothing, {"tie_word_embeddings": False}, "lacks lm_head.weight"),
    (nothing, {"intermediate_size": 64}, r"down_proj.weight.*: \[64, 128\], but the configuration has \[64, 64\]"),
]


@pytest.mark.parametrize(("change", "config", "message"), DAMAGE, ids=[message[:24] for _, _, message in DAMAGE])
def test_a_model_that_is_not_whole_is_refused_by_name(
    lm: Path, tmp_path: Path, change: Any, config: dict[str, Any], message: str
) -> None:
    model = changed(lm, tmp_path / "model", change, **config)
    with pytest.raises(InputError, match=message):
        load_model(model)
    code, said, _ = broken.lvctx("extend-lm", "--model", model, "--steps", 0, "-q", "-o", tmp_path / "out")
    assert (code, said.startswith(f"lvctx: {model}")) == (3, True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_untied_head_has_to_be_there(untied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks lm_head\.weight"):
        load_model(changed(untied, tmp_path, drop("lm_head.weight")))


def test_what_stock_transformers_reads_whole_is_read(lm: Path, untied: Path, tmp_path: Path) -> None:
    """Tied weights stored once or twice, buffers of old checkpoints, names without their prefix, two shards."""

    def old(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    def twice(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def bare(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    for number, change in enumerate((nothing, old, twice, bare)):
        path = changed(lm, tmp_path / str(number), change)
        stock = AutoModelForCausalLM.from_pretrained(path).state_dict()
        ours = load_model(path).state_dict()
        assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert load_model(untied)


def test_a_layer_that_transformers_ignores_by_name_is_found(
    lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some classes ignore a layer for multi-token prediction; a decoder layer of that number is no such thing."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1\..*"])
    model = changed(lm, tmp_path / "few", nothing, num_hidden_layers=1)
    _, stock = LlamaForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not stock["unexpected_keys"], "which is why it needs looking for"
    with pytest.raises(InputError, match=r"holds model\.layers\.1\.input_layernorm\.weight"):
        load_model(model)

    def predicts(tensors: Tensors) -> None:
        tensors["model.layers.1.eh_proj.weight"] = torch.zeros(2, 2)

    assert load_model(changed(lm, tmp_path / "mtp", predicts, num_hidden_layers=1))


@pytest.mark.parametrize("kind", ["vlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_language_models_too(vlm: Path, tmp_path: Path, kind: str) -> None:
    source = vlm if kind == "vlm" else mrope_models.save(kind, tmp_path / "whole")
    assert load_model(source)
    stored = sorted(load_file(source / "model.safetensors"))
    ends = ("layers.1.mlp.up_proj.weight", "norm1.weight", "multi_modal_projector.linear_2.bias")
    found = [name for end in ends for name in [n for n in stored if n.endswith(end)][:1]]
    assert len(found) >= 2
    for name in found:
        with pytest.raises(InputError, match=f"lacks .*{name.split('.', 2)[-1]}"):
            load_model(changed(source, tmp_path / "less", drop(name)))


def test_a_tower_is_held_to_its_configuration(tiny_tower: Path, tmp_path: Path) -> None:
    name = next(n for n in load_file(tiny_tower / "model.safetensors") if n.endswith("layers.0.mlp.fc1.weight"))
    for number, (change, config, message) in enumerate(
        [
            (drop(name), {}, r"lacks encoder\.layers\.0\.mlp\.fc1\.weight"),
            (nothing, {"num_hidden_layers": 1}, r"holds encoder\.layers\.1\..* and 8 more"),
            (nothing, {"num_hidden_layers": 3}, r"lacks encoder\.layers\.2\..* and 8 more"),
            (nothing, {"image_size": 60}, r"position_embedding\.weight: \[17, 32\]"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            load_tower(changed(tiny_tower, tmp_path / str(number), change, **config), dtype=torch.float32)


def test_a_full_clips_text_is_not_read(tiny_tower: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    whole = CLIPModel(CLIPConfig(vision_config={**small, "image_size": 48, "patch_size": 12}, text_config=text))
    whole.save_pretrained(tmp_path)
    shutil.copyfile(tiny_tower / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    stored = load_vision_model(tmp_path, dtype=torch.float32).state_dict()
    stock = whole.vision_model.state_dict()
    assert all(torch.equal(stored[name], stock[name]) for name in stock)


def test_a_siglip_tower_may_come_without_its_head_but_not_with_half_of_it(tiny_tower: Path, tmp_path: Path) -> None:
    from transformers import SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=12
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "whole")
    shutil.copyfile(tiny_tower / "preprocessor_config.json", tmp_path / "whole" / "preprocessor_config.json")
    heads = [n for n in load_file(tmp_path / "whole" / "model.safetensors") if "head." in n]

    def headless(tensors: Tensors) -> None:
        for name in heads:
            del tensors[name]

    model = load_vision_model(changed(tmp_path / "whole", tmp_path / "headless", headless), dtype=torch.float32)
    assert not any(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(InputError, match=r"lacks head\."):
        load_vision_model(changed(tmp_path / "whole", tmp_path / "half", drop(heads[0])), dtype=torch.float32)


def test_an_adapter_names_what_does_not_fit(lm: Path, tmp_path: Path) -> None:
    from lvctx.artifacts.manifest import Provenance

    made = Provenance(schema="lvctx.model/1", command="extend-lm", config={}, inputs={})
    model = load_model(lm)
    wrapped = add_lora(model.get_decoder(), rank=2, targets=ATTENTION, seed=0)
    save_adapter(tmp_path, model, wrapped, made, longest=0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    gone = sorted(tensors)[0]
    tensors.pop(gone)
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=f"lacks .*{gone[gone.index('layers') :]}"):
        load_adapter(tmp_path / "less.safetensors", model, wrapped)


def split(lm: Path, out: Path) -> Path:
    """The model in two shards with an index."""
    tensors = load_file(lm / "model.safetensors")
    broken.clone(lm, out)
    (out / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metadata": None}, "metadata is null"),
        ({"weight_map": None}, "does not map tensors to files"),
        ({"weight_map": ["model-00001-of-00002.safetensors"]}, "does not map tensors to files"),
        ({"weight_map": {"a": 1}}, "does not map tensors to files"),
        ({"weight_map": {}}, "does not map tensors to files"),
        ({"weight_map": {"a": "../lm/model.safetensors"}}, r"'\.\./lm/model\.safetensors' is not a safetensors file"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not a safetensors file of this directory"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "is not a safetensors file of this directory"),
        ({"weight_map": {"a": "model-9.safetensors"}}, r"missing model-9\.safetensors"),
    ],
)
def test_an_index_is_one_or_is_refused(lm: Path, tmp_path: Path, values: dict[str, Any], message: str) -> None:
    model = split(lm, tmp_path / "model")
    assert load_model(model)
    broken.edit(model, file="model.safetensors.index.json", **values)
    for read in (resolve_model, load_model, read_weights, describe):
        with pytest.raises(InputError, match=message):
            read(model)


def test_a_single_file_comes_before_an_index_as_in_transformers(lm: Path, tmp_path: Path) -> None:
    model = split(lm, tmp_path)
    shutil.copyfile(lm / "model.safetensors", model / "model.safetensors")
    assert shard_names(model) == ["model.safetensors"]
    assert describe(model)["model"]["parameters"] == sum(p.numel() for p in load_model(lm).parameters())


def test_a_file_in_place_of_weights_is_named(lm: Path, tmp_path: Path) -> None:
    pointer = broken.clone(lm, tmp_path / "lfs")
    (pointer / "model.safetensors").unlink()
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with refused(InputError, "lfs/model.safetensors"):
        load_model(pointer)

    def fp8(tensors: Tensors) -> None:
        tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)

    with pytest.raises(InputError, match=f"{UP} is F8_E4M3"):
        load_model(changed(lm, tmp_path / "fp8", fp8))
    (broken.clone(lm, tmp_path / "peft") / "adapter_config.json").write_text("{}")
    with refused(InputError, "peft"):
        load_model(tmp_path / "peft")
    with refused(InputError, "huge"):
        load_model(broken.edit(broken.clone(lm, tmp_path / "huge"), vocab_size=1 << 25, intermediate_size=1 << 20))


def test_quantized_weights_are_3_to_train_and_5_without_their_package(lm: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    model = broken.edit(broken.clone(lm, tmp_path / "model"), quantization_config=quantization)
    code, said, _ = broken.lvctx("extend-lm", "--model", model, "--steps", 0, "-q", "-o", tmp_path / "out")
    assert code == 3
    assert "quantized (gptq)" in said
    with pytest.raises((MissingError, InputError), match=r"cannot (load|read)"):
        load_model(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no model_type"),
        ('{"hidden_size": 64}', "no model_type"),
        ('{"model_type": null}', "no model_type"),
        ("[]", "holds a JSON list"),
        ("not JSON", "malformed JSON"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "num_attention_heads is 0"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000"),
        ('{"model_type": "llava_onevision", "text_config": []}', "text_config is not a JSON object"),
        ('{"model_type": "llava_onevision", "text_config": {"hidden_size": "x"}}', r"text_config\.hidden_size is 'x'"),
    ],
)
def test_what_is_no_configuration_is_3_for_every_command(lm: Path, tmp_path: Path, content: str, message: str) -> None:
    model = broken.clone(lm, tmp_path / "model")
    (model / "config.json").write_text(content)
    for command in (
        ["info", model],
        ["plan", "extend-lm", "--model", model, "--seq-len", 64],
        ["extend-lm", "--model", model, "--steps", 0, "-q", "-o", tmp_path / "out"],
        ["mrope-extend", "--model", model, "--scale", 2, "-q", "-o", tmp_path / "out"],
    ):
        code, said, _ = broken.lvctx(*command)
        assert code == 3, command
        assert message.replace("\\", "") in said, command


def test_info_needs_weights(lm: Path, tmp_path: Path) -> None:
    shutil.copyfile(lm / "config.json", tmp_path / "config.json")
    code, said, _ = broken.lvctx("info", tmp_path)
    assert code == 3
    assert "missing model.safetensors" in said


def test_a_null_text_config_is_none(lm: Path, tmp_path: Path) -> None:
    model = broken.edit(broken.clone(lm, tmp_path / "model"), text_config=None)
    assert broken.lvctx("plan", "extend-lm", "--model", model, "--seq-len", 64, "--device", "cpu")[0] == 0
    assert broken.lvctx("info", model)[0] == 0
    assert broken.lvctx("extend-lm", "--model", model, "--steps", 0, "-q", "-o", tmp_path / "out")[0] in (0, 3)


def test_positions_of_an_unknown_type_are_refused_and_can_be_made_plain(lm: Path, tmp_path: Path) -> None:
    raw = json.loads((lm / "config.json").read_text())
    raw.pop("rope_parameters")
    model = broken.clone(lm, tmp_path / "su")
    (model / "config.json").write_text(
        json.dumps(raw | {"rope_theta": 1e4, "rope_scaling": {"type": "su", "factor": 2.0}})
    )
    extend = ["extend-lm", "--model", model, "--steps", 0, "-q", "-o", tmp_path / "out"]
    code, said, _ = broken.lvctx(*extend, "--rope", "none")
    assert code == 3
    assert "'su', which transformers does not compute; --rope theta" in said
    with pytest.raises(InputError, match="'su'"):
        load_model(model)
    assert broken.lvctx(*extend, "--rope", "theta")[0] == 0


def test_linear_positions_ask_for_the_original_length(lm: Path, tmp_path: Path) -> None:
    """Some models write the length before stretching beside them, some the length after: 4,096 may be either."""
    raw = json.loads((lm / "config.json").read_text())
    raw.pop("rope_parameters")
    raw |= {"max_position_embeddings": 4096, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    model = broken.clone(lm, tmp_path / "old")
    (model / "config.json").write_text(json.dumps(raw))
    extend = ["extend-lm", "--model", model, "--rope", "pi", "--steps", 0, "-q"]
    code, said, _ = broken.lvctx(*extend, "--context", 65536, "-o", tmp_path / "no")
    assert code == 3
    assert "give --original-length, 4096 or 1024" in said
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    niah = ["niah", "text", "--model", model, "--haystack", text, "--lengths", 300, "--depths", 0.5]
    code, said, _ = broken.lvctx(*niah, "--trials", 1, "--rope", "pi:8", "-q", "-o", tmp_path / "niah")
    assert code == 0, said  # a factor is all that reading needs
    code, said, _ = broken.lvctx(*extend, "--context", 65536, "--original-length", 4096, "-o", tmp_path / "once")
    assert code == 0, said
    rope = load_config(tmp_path / "once").rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 16.0)
    again = ["extend-lm", "--model", tmp_path / "once", "--rope", "pi", "--steps", 0, "-q", "--context", 131072]
    assert broken.lvctx(*again, "-o", tmp_path / "twice")[0] == 0, "our own manifest has the length"
    assert load_config(tmp_path / "twice").rope_parameters["factor"] == 32.0
    code, said, _ = broken.lvctx(*again, "--original-length", 1024, "-o", tmp_path / "other")
    assert code == 2
    assert "has 4096" in said
    code, said, _ = broken.lvctx(
        "extend-lm", "--model", model, "--original-length", 9, "--steps", 0, "-o", tmp_path / "x"
    )
    assert code == 2
    assert "--original-length has no meaning with --rope theta" in said


@pytest.mark.parametrize("template", [t for t in broken.TEMPLATES if "[0]['text']" not in t])
def test_a_template_that_raises_or_leaves_out_what_is_asked_is_one_line(
    lm: Path, tmp_path: Path, template: str
) -> None:
    model = broken.clone(lm, tmp_path)
    (model / "chat_template.jinja").write_text(template)
    with refused(InputError, str(model)):
        chat_encoder(load_tokenizer(model)).prompt([{"role": "user", "content": "Why?"}])


def test_only_a_librarys_errors_become_one_line() -> None:
    with (
        pytest.raises(InputError, match=r"f\.json: unusable \(KeyError 'x'\)"),
        library_errors("unusable", where="f.json"),
    ):
        {}["x"]
    with pytest.raises(MissingError, match="no module"), library_errors("unusable"):
        raise ImportError("there is no module of that name")
    with pytest.raises(InputError, match=r"^kept$"), library_errors("unusable"):
        raise InputError("kept")
    with pytest.raises(KeyboardInterrupt), library_errors("unusable"):
        raise KeyboardInterrupt


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of the model's type where the directory has none."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    config = AutoConfig.for_model("qwen3_5_text", linear_key_head_dim=8, linear_value_head_dim=8, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError) as refused:
        load_tokenizer(tmp_path)
    assert refused.value.where == tmp_path
