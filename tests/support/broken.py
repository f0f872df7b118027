"""Tiny models whose files can be damaged, and random damage to their JSON, chat templates and bytes."""

import copy
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from typer.testing import CliRunner

from lvctx.cli.app import app
from support import mrope_models

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 1.5, 1e-9, 10**9, 10**30, float("nan"),
    "", "x", "auto", "../x", "\0", [], {}, [None], ["x"], [1, 2], {"a": 1},
]  # fmt: skip
TEMPLATES = [
    "{{ raise_exception('no such turn') }}",
    "{{ x.y.z }}",
    "{% for m in messages %}",
    "{{ messages[5].content }}",
    "{{ 1 / 0 }}",
    "",
    "{{ messages | nosuch }}",
    "{% for i in range(10 ** 9) %}a{% endfor %}",
    "no placeholder",
    "{{ messages[0]['content'][0]['text'] }}",
    '{{ "a" + 1 }}',
    '{% include "x" %}',
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
]
ROPES: list[Any] = [
    *({"type": "linear", "factor": 4}, {"type": "dynamic", "factor": 2.0}, {"type": "su", "factor": 2}, [], "x"),
    *({"rope_type": "yarn"}, {"rope_type": "yarn", "factor": 0}, {"rope_type": "yarn", "factor": "4"}),
    *({"rope_type": "llama3", "factor": 8}, {"rope_type": None}, {"type": ["x"]}, {"mrope_section": [1, 2]}),
    {"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": [1]},
    *({"rope_type": "default", "rope_theta": 0}, {"rope_type": "default", "rope_theta": "1e4"}),
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3},
]


def lvctx(*args: object) -> tuple[int, str, BaseException | None]:
    """Exit code, our line on stderr, and what ended it."""
    done = CliRunner().invoke(app, [*map(str, args)])
    said = [line for line in done.stderr.splitlines() if line.startswith("lvctx: ")]
    return done.exit_code, "".join(said[-1:]), done.exception


def save_lm(out: Path, *, tied: bool = True, layers: int = 2, intermediate: int = 128) -> Path:
    """A random Llama with a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = mrope_models.tokenizer()
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def save_vlm(lm: Path, tower: Path, out: Path) -> Path:
    """The two and a random projector."""
    from lvctx.models.loading import load_model, load_tokenizer
    from lvctx.models.vision_encoder import load_vision_model
    from lvctx.models.vlm_assembly import assemble
    from lvctx.models.vlm_assembly import save_vlm as save

    model, tokenizer = load_model(lm), load_tokenizer(lm)
    vision = load_vision_model(tower, dtype=model.dtype)
    save(assemble(model, vision, tokenizer, where=lm, seed=0), tokenizer, tower, out)
    return out


def clone(source: Path, out: Path) -> Path:
    """A model directory whose small files may be changed; weights are linked."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, out / path.name)
        elif path.is_file():
            os.link(path, out / path.name)
    return out


def edit(directory: Path, *, file: str = "config.json", **values: Any) -> Path:
    """Set keys of a JSON file."""
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(*path, key), *_places(value[key], (*path, key))]]


def mutate(value: Any, rng: Random) -> Any:
    """The JSON value with one to three of its places changed or removed; now and then another value altogether."""
    if rng.random() < 0.03:
        return copy.deepcopy(rng.choice(VALUES))
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(value)
        if not places:
            break
        *way, key = rng.choice(places)
        parent = value
        for step in way:
            parent = parent[step]
        if isinstance(parent, dict) and rng.random() < 0.15:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


FILES = (
    *["config.json"] * 5,
    "rope", "template", "bytes", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def damage(directory: Path, rng: Random) -> str:
    """Damage one file of a cloned model; which, in a word."""
    file = rng.choice([f for f in FILES if "." not in f or "index" in f or (directory / f).is_file()])
    if file == "template":
        (directory / "chat_template.jinja").write_text(rng.choice(TEMPLATES))
    elif file == "rope":
        config = json.loads((directory / "config.json").read_text())
        part = config.get("text_config", config)
        part.pop("rope_parameters", None)
        part[rng.choice(["rope_parameters", "rope_scaling"])] = rng.choice(ROPES)
        (directory / "config.json").write_text(json.dumps(config))
    elif file == "bytes":
        path = rng.choice(sorted(directory.iterdir()))
        content = bytearray(path.read_bytes())
        for _ in range(3):
            content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
        path.unlink()
        path.write_bytes(rng.choice([content, content[: rng.randrange(len(content))], b"", b"\xff\xfe" + content]))
        file = f"bytes of {path.name}"
    elif file == "model.safetensors.index.json":
        shard = "model-00001-of-00001.safetensors"
        (directory / "model.safetensors").rename(directory / shard)
        header = json.loads((directory / shard).read_bytes()[8:].split(b"}}")[0] + b"}}")
        names = {name: shard for name in header if name != "__metadata__"}
        index = mutate({"metadata": {"total_size": 1}, "weight_map": names}, rng)
        (directory / file).write_text(json.dumps(index))
    else:
        path = directory / file
        path.write_text(json.dumps(mutate(json.loads(path.read_text()), rng)))
    return file
