"""Files beside config.json for runtimes that need them to compute a model's positions, and the section about runtimes
in the model card. The differences between runtimes: `lvctx/rope/runtimes.py`.
"""

import copy
import shlex
import shutil
from pathlib import Path
from typing import Any

from lvctx.artifacts.model_config import language_part, read_model_config
from lvctx.artifacts.store import atomic_file, write_json
from lvctx.models.card import POSITIONS, write_section
from lvctx.rope.runtimes import GGUF, llama_cpp, sglang, vllm
from lvctx.rope.scaling import full_attention_rope

VLLM, SGLANG, LLAMA_CPP = "vllm.json", "sglang", "llama.cpp.txt"
"""SGLANG is a directory, since SGLang's command-line overrides do not apply to a VLM's language model."""
SIDE_FILES = (VLLM, LLAMA_CPP)


def write_side_files(out: Path, title: str | None = None) -> list[str]:
    """Write the side files of the model in `out` and the card's section on positions; returns the names of the files.

    `title` describes the positions in the card; by default those of config.json. Files of an earlier run are
    replaced or removed. Where layers differ in their positions there are none: other runtimes were not run on such.
    """
    raw = read_model_config(out)
    text = language_part(raw)
    stored = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope = {"rope_type": "default", "rope_theta": text.get("rope_theta"), **full_attention_rope(stored)}
    context, model_type = int(text["max_position_embeddings"]), raw["model_type"]
    for name in SIDE_FILES:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / SGLANG, ignore_errors=True)
    files = [p.name for p in out.iterdir() if p.is_file() and not p.name.startswith(".")]
    names: list[str] = []
    lines = dict.fromkeys(("transformers", "vLLM", "SGLang"), "reads config.json as it is")
    if full_attention_rope(stored) is not stored:
        lines |= dict.fromkeys(("vLLM", "SGLang", "llama.cpp"), "not tested with positions that differ by layer")
        title = f"Layers with full attention: {_title(rope, context)} Those with a sliding window are unchanged."
        _write_card(out, title, lines)
        return names
    sections = "mrope_section" in rope

    overrides = vllm(rope, model_type=model_type, context=context)
    if overrides:
        nested = "text_config" in raw and "text_config" not in overrides
        write_json(out / VLLM, {"text_config": overrides} if nested else overrides)
        names.append(VLLM)
        command = f'`vllm serve DIR --hf-overrides "$(cat DIR/{VLLM})"`'
        lines["vLLM"] = (
            f"{command}; without it vLLM computes other frequencies, silently (run with 0.32)"
            if sections
            else f"0.31 and later read config.json as it is; before that {command}"
        )
    elif rope["rope_type"] == "linear" and not sections:
        lines["vLLM"] = f"`vllm serve DIR --max-model-len {context}` (its default is {rope['factor']:g} x that)"
    elif sections and rope["rope_type"] == "yarn" and overrides is not None:
        lines["vLLM"] = "0.32 and later read config.json as it is; earlier versions place the ramp elsewhere"

    for_sglang = sglang(rope)
    if for_sglang not in (None, rope):
        folder = out / SGLANG
        folder.mkdir()
        write_json(folder / "config.json", with_rope(raw, for_sglang, context))
        for name in files:
            if name not in ("config.json", "README.md", "MANIFEST.json", "metrics.jsonl"):
                (folder / name).symlink_to(Path("..") / name)
        names.append(f"{SGLANG}/config.json")
        lines["SGLang"] = f"`python -m sglang.launch_server --model-path DIR/{SGLANG}`"
    if overrides is None:
        lines["vLLM"] = lines["SGLang"] = "cannot compute these positions: it drops the sections of this rope_type"

    lines["llama.cpp"] = _for_llama_cpp(out, rope, model_type, context, names)
    _write_card(out, title or _title(rope, context), lines)
    return names


def _write_card(out: Path, title: str, lines: dict[str, str]) -> None:
    """Write the card's section: a title, and a line per runtime."""
    # Without the directory's name, so that the same model has the same bytes anywhere.
    listed = "".join(f"- {name}: {line}\n" for name, line in lines.items())
    write_section(out, POSITIONS, f"{title} DIR is this directory.\n\n{listed}")


def _title(rope: dict[str, Any], context: int) -> str:
    scheme = {"linear": "linear interpolation", "yarn": "YaRN"}.get(rope["rope_type"], rope["rope_type"])
    scaled = f"{scheme} by {rope['factor']:g}, " if "factor" in rope else ""
    sharper = f"attention factor {rope['attention_factor']:g}, " if "attention_factor" in rope else ""
    return f"{scaled}{sharper}RoPE base {rope['rope_theta']:g}, {context:,} positions."


def _for_llama_cpp(out: Path, rope: dict[str, Any], model_type: str, context: int, names: list[str]) -> str:
    """Write llama.cpp's flags if it needs any, and return the card's line about it."""
    flags = llama_cpp(rope, model_type=model_type, context=context)
    if flags is None:
        known = model_type in GGUF
        return (
            f"cannot compute these positions: it has no flag for {rope['rope_type']}" if known else "does not read it"
        )
    if flags:
        with atomic_file(out / LLAMA_CPP) as partial:
            partial.write_text(shlex.join(flags) + "\n", encoding="utf-8")
        names.append(LLAMA_CPP)
    which = "THE_UNEXTENDED" if "mrope_section" in rope else "DIR"
    more = f" $(cat DIR/{LLAMA_CPP})" if flags else ""
    return f"`llama-server -m {which}.gguf -c {context}{more}`"


def with_rope(raw: dict[str, Any], rope: dict[str, Any], context: int) -> dict[str, Any]:
    """config.json with other positions and no other change, in its own style.

    transformers 5 writes `text_config.rope_parameters`; released checkpoints are flat and have `rope_scaling`, with the
    base beside it, as older programs expect.
    """
    new = copy.deepcopy(raw)
    text = new.get("text_config")
    text = text if text is not None else new
    for place in {id(p): p for p in (new, text)}.values():
        for key in ("rope_scaling", "rope_parameters"):
            if key in place:
                place[key] = dict(rope)
        if "rope_theta" in place:
            place["rope_theta"] = rope["rope_theta"]
        if "max_position_embeddings" in place:
            place["max_position_embeddings"] = context
    if "rope_scaling" not in text and "rope_parameters" not in text:
        text["rope_parameters"] = dict(rope)
    text["max_position_embeddings"] = context
    return new
