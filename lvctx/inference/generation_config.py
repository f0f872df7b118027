"""A model's generation_config.json: its sampling parameters, as `generate` of transformers takes them, or none."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lvctx.artifacts.store import read_json
from lvctx.errors import InputError, UsageError
from lvctx.inference.sampling_params import SamplingParams

ParamsT = TypeVar("ParamsT", bound=SamplingParams)
DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
"""The sampling parameters, with what `generate` takes where the file has none."""
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "sequence_bias": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "watermarking_config": None,
    "dola_layers": None,
    "stop_strings": None,
    "max_time": None,
}
"""What else decides a reply, and the values with which it does not. How long a reply is, options decide."""


def resolve_sampling(params: ParamsT, model: str, given: Collection[str]) -> ParamsT:
    """With the parameters of the model's generation_config.json, if these are wanted, but for the `given` ones.

    Raises InputError for a file that is missing, malformed or has parameters that are not supported, UsageError for
    given options that have no effect on greedy decoding.
    """
    if not params.use_generation_config:
        return params
    from lvctx.models.loading import resolve_model

    values = read_generation_config(resolve_model(model, weights=False))
    values |= {name: getattr(params, name) for name in DEFAULTS if name in given}
    samples = values.pop("do_sample") or "temperature" in given
    if not samples or not values["temperature"]:
        values |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        if useless := [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "seed") if name in given]:
            what = f"{', '.join(useless)} without sampling: the model's generation_config.json is greedy"
            raise UsageError(what, fix="give --temperature")
    return replace(params, **values)


def read_generation_config(path: Path) -> dict[str, Any]:
    """`DEFAULTS` with the values of a model directory's file. Raises InputError."""
    file = path / "generation_config.json"
    if not file.is_file():
        raise InputError("no generation_config.json", where=path, fix="drop --use-generation-config")
    stored = {name: value for name, value in read_json(file).items() if value is not None}
    others = [name for name, neutral in NEUTRAL.items() if stored.get(name, neutral) not in (neutral, [])]
    if others:
        found = ", ".join(f"{name} {stored[name]!r:.40}" for name in others)
        fix = "drop --use-generation-config, or remove it from the file"
        raise InputError(f"{found} is not supported", where=file, fix=fix)
    values = {name: stored.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in values.items():
        kinds = {"do_sample": (bool,), "top_k": (int,)}.get(name, (int, float))
        if type(value) not in kinds or value < 0 or (name in ("top_p", "repetition_penalty") and not value):
            raise InputError(f"{name} is {value!r}", where=file, fix="correct it")
    return values


def drop_sampling(model: Any) -> None:
    """Make a loaded model's `generate` greedy, whatever its generation_config.json has."""
    from transformers import GenerationConfig

    plain = GenerationConfig()
    for name in (*DEFAULTS, *NEUTRAL):
        setattr(model.generation_config, name, getattr(plain, name, None))
