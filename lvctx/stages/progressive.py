"""Progressive extension: train at one length, then at the next from what that made (EasyContext; GIRAFFE, appendix E).

A stage is `extend-lm` (or `mrope-extend`) with flags of its own. All but the last write a finished model into
`OUT/stage-N`, so whatever stands is not done again; the last writes OUT itself, under the name of the whole run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvctx.artifacts.manifest import Provenance, is_finished
from lvctx.errors import LvctxError, UsageError
from lvctx.stages.extend import Plan, run_extend

Planner = Callable[..., Any]
"""`plan_extend` with the run's own flags filled in; a stage's come on top. What it makes has a `provenance`."""

KEYS: dict[str, Callable[[str], Any]] = {
    "seq_len": int,
    "context": int,
    "steps": int,
    "batch_tokens": int,
    "rope_theta": float,
    "factor": float,
    "lr": float,
    "data": Path,
}
"""What a stage may set."""


def parse_stage(text: str, keys: Mapping[str, Callable[[str], Any]] = KEYS) -> dict[str, Any]:
    """Flags of a stage written as `seq-len=32768,rope-theta=1e6,steps=1000`; `keys` may be set. Raises UsageError."""
    flags = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        key = name.strip().replace("-", "_")
        if key not in keys:
            raise UsageError(
                f"--stage has no {name.strip()!r}", fix="it has " + ", ".join(keys).replace("_", "-") + " as KEY=VALUE"
            )
        try:
            flags[key] = keys[key](value.strip())
        except ValueError:
            raise UsageError(f"--stage {name.strip()}: {value!r} is no {keys[key].__name__}") from None
    return flags


def plan_stages(plan: Planner, stages: Sequence[Mapping[str, Any]], *, seed: int) -> list[Any]:
    """Check every stage, each as if it were the first: what their rows and positions are does not depend on training.

    Stage N draws its rows with seed + N: the same length again is to read other rows.
    """
    plans = []
    for number, flags in enumerate(stages):
        try:
            plans.append(plan(**flags, seed=seed + number))
        except LvctxError as e:
            e.args = (f"stage {number + 1}: {e}",)
            raise
    return plans


def whole(plans: Sequence[Any]) -> Provenance:
    """What identifies all stages as one run."""
    first = plans[0].provenance
    data = {f"data-{n + 1}": p.provenance.inputs["data"] for n, p in enumerate(plans) if "data" in p.provenance.inputs}
    return replace(
        first,
        config={"stages": [dict(p.provenance.config) for p in plans]},
        inputs={"model": first.inputs["model"], **data},
    )


def unite(last: Plan, first: Plan, provenance: Provenance) -> Plan:
    """The last stage under the name of the whole run, which began where the first does."""
    return replace(last, provenance=provenance, original_context=first.original_context)


def run_stages(
    plan: Planner,
    stages: Sequence[Mapping[str, Any]],
    out: Path,
    *,
    seed: int,
    resume: str,
    force: bool,
    report: Callable[[int, int, str], None],
    run: Callable[..., None] = run_extend,
    unite: Callable[[Any, Any, Provenance], Any] = unite,
    **how: Any,
) -> None:
    """Run the stages that are not finished, with `how` for what else `run` takes; none if `out` is finished."""
    plans = plan_stages(plan, stages, seed=seed)
    provenance = whole(plans)
    if is_finished(out, unite(plans[-1], plans[0], provenance).provenance, resume=resume, force=force):
        return
    anew = force or resume == "never"
    source: dict[str, Any] = {}
    for number, flags in enumerate(stages):
        step = plan(**flags, **source, seed=seed + number)
        last = number == len(stages) - 1
        target = out if last else out / f"stage-{number + 1}"
        if last:
            step = unite(step, plans[0], provenance)
        note = f"stage {number + 1}/{len(stages)}"
        run(
            step,
            target,
            resume="auto",
            force=anew,
            report=lambda done, total, said, note=note: report(done, total, f"{note}, {said}"),
            **how,
        )
        source = {"model": str(target)}
