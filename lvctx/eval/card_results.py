"""Results of runs as a model card has them: `EvalResult`s of the hub's model-index. No model, no torch."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import read_jsonl
from lvctx.artifacts.result_log import RESULTS
from lvctx.artifacts.store import fingerprint
from lvctx.errors import InputError
from lvctx.eval.benchmarks.accuracy import read_benchmark_run
from lvctx.eval.benchmarks.benchmark_list import BENCHMARKS
from lvctx.eval.benchmarks.score_run import score_run
from lvctx.eval.niah.results import THRESHOLD, build_results
from lvctx.eval.report.needle_section import FIELDS
from lvctx.eval.report.question_section import headline_rule, load_benchmark_of
from lvctx.eval.report.run_files import RunFile, check_fields, find_runs

TEXT, VIDEO, IMAGES = "text-generation", "video-text-to-text", "image-text-to-text"
"""Tasks of the hub."""


def read_card_results(paths: Sequence[Path], model: Path) -> list[EvalResult]:
    """The results in directories or files of niah, videomme, bench or perplexity; accuracies in percent.

    Raises InputError for results of another kind or of another model than the one in `model`, as far as they name it.
    """
    model_hash = fingerprint(model)[:16]
    return [result for path in paths for result in _read(path, model_hash)]


def _read(path: Path, model_hash: str) -> list[EvalResult]:
    if path.is_file() and path.suffix == ".jsonl" and path.name != RESULTS:
        rows = list(read_jsonl(path))
        if rows and rows[0].get("schema") == schemas.PERPLEXITY:
            return [
                result for number, row in enumerate(rows, start=1) for result in _perplexity(row, f"{path}:{number}")
            ]
    results = []
    for run in find_runs(path):
        if run.kind not in ("needles", "benchmark"):
            raise InputError(f"{run.kind} have no score for a card", where=run.path, fix="give niah, videomme or bench")
        _check_model(run, model_hash)
        results += _needles(run) if run.kind == "needles" else _benchmark(run)
    return results


def _check_model(run: RunFile, model_hash: str) -> None:
    """Raise InputError for a run that computed with another model; a server's run names no model's hash."""
    for where, row in run.rows.items():
        made_of = row.get("made_of")
        stated = str(made_of.get("model")) if isinstance(made_of, dict) else ""
        if re.fullmatch("[0-9a-f]{16}", stated) and stated != model_hash:
            raise InputError("results of another model", where=where, fix="export the model that was evaluated")


def _needles(run: RunFile) -> list[EvalResult]:
    check_fields(run.rows, FIELDS)
    results = build_results(run.rows.values(), run.name)
    video, longest = results.modality == "video", f"up to {results.lengths[-1]:,} {results.unit}"
    right, cells = results.total
    if not cells:
        raise InputError("no cell has a result", where=run.path)
    common: dict[str, Any] = {
        "task_type": VIDEO if video else TEXT,
        "dataset_type": f"niah-{results.modality}",
        "dataset_name": f"Needle in a haystack, {results.modality}",
    }
    accuracy = EvalResult(
        **common,
        metric_type="accuracy",
        metric_value=_percent(right / cells),
        metric_name=f"accuracy in percent, {longest}, {_interval(results.interval)}, {cells:,} cells",
    )
    effective = results.effective(THRESHOLD)
    length = EvalResult(
        **common,
        metric_type="effective-length",
        metric_value=0 if effective is None else results.lengths[effective],
        metric_name=f"effective length at {THRESHOLD:g}, {results.unit}, tested {longest}",
    )
    return [accuracy, length]


def _benchmark(run: RunFile) -> list[EvalResult]:
    first = next(iter(run.rows.values()))
    bench = load_benchmark_of(first, run.path)
    scored, info = score_run(read_benchmark_run(run.path, bench), bench), BENCHMARKS[bench.NAME]
    made_of = first["made_of"] if isinstance(first.get("made_of"), dict) else {}
    rule = headline_rule(made_of, list(scored["rules"]))
    estimates = {} if rule is None else {f"rule {rule}": scored["rules"][rule]}
    # A benchmark's own scorer: its first score is the overall one.
    own = next(iter(scored["official"]["scores"].items()), None) if "official" in scored else None
    if own is not None:
        estimates[f"the benchmark's own rule, {own[0]}"] = own[1]
    settings = _settings(made_of)
    common: dict[str, Any] = {
        "task_type": IMAGES if bench.NAME == "vhs" else VIDEO,
        "dataset_type": info.dataset,
        "dataset_name": info.title,
    }
    return [
        EvalResult(
            **common,
            metric_type="accuracy",
            metric_value=_percent(estimate["mean"]),
            metric_name=f"accuracy in percent, {name}{settings}, {_interval((estimate['low'], estimate['high']))}, "
            f"{estimate['counted']:,} of {info.questions:,} questions",
        )
        for name, estimate in estimates.items()
        if estimate["mean"] is not None
    ]


def _perplexity(row: Mapping[str, Any], where: str) -> list[EvalResult]:
    value, length, count = row.get("perplexity"), row.get("seq_len"), row.get("rows")
    if not isinstance(value, float) or not isinstance(length, int) or not isinstance(count, int):
        raise InputError("missing or invalid perplexity, seq_len or rows", where=where)
    data = f"Packed rows {row.get('data')!s:.16}"
    name = f"perplexity, {count:,} rows of {length:,} tokens"
    return [
        EvalResult(
            task_type=TEXT,
            dataset_type="packed-rows",
            dataset_name=data,
            metric_type="perplexity",
            metric_value=value,
            metric_name=name,
        )
    ]


def _settings(made_of: Mapping[str, Any]) -> str:
    """Frames, subtitles and protocol of a run, each after a comma."""
    sampling, protocol = made_of.get("sampling"), made_of.get("protocol")
    sampling = sampling if isinstance(sampling, dict) else {}
    parts = [f"{key.replace('_', ' ')} {sampling[key]}" for key in ("fps", "frames", "max_frames") if sampling.get(key)]
    parts += ["with subtitles"] if made_of.get("subtitles") is True else []
    parts += [f"protocol {protocol.get('name')}"] if isinstance(protocol, dict) else []
    return "".join(f", {part}" for part in parts)


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _interval(bounds: Sequence[float | None] | None) -> str:
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return "no interval"
    return f"95% {100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"
