"""Progressive extension: train at one length, then from the result at the next (EasyContext; GIRAFFE, appendix E).

A stage is `extend-lm` (or `mrope-extend`) with its own options. All but the last write a finished model to
`OUT/stage-N`, so finished stages are not repeated; the last writes OUT itself, with the provenance of the whole run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from lvctx.artifacts.manifest import Provenance, is_finished
from lvctx.config import OnProgress
from lvctx.errors import LvctxError, UsageError
from lvctx.training.extend_config import ExtendConfig
from lvctx.training.mrope_config import MropeConfig
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.run_training import run_training
from lvctx.training.task import TrainingTask

ConfigT = TypeVar("ConfigT", ExtendConfig, MropeConfig)


class StageJob(Protocol):
    """A checked stage."""

    @property
    def provenance(self) -> Provenance:
        """What identifies the stage."""

    def task(self) -> TrainingTask[Any]:
        """Its training."""

    def as_final_stage(self, first: Any, provenance: Provenance) -> "StageJob":
        """This job as the last of several stages that began with `first`, under the provenance of the whole run."""


def parse_stage(text: str, keys: Mapping[str, Callable[[str], Any]] = ExtendConfig.stage_keys) -> dict[str, Any]:
    """Fields of a stage written as `seq-len=32768,rope-theta=1e6,steps=1000`; allowed are `keys`. Raises UsageError."""
    values = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        key = name.strip().replace("-", "_")
        if key not in keys:
            raise UsageError(
                f"--stage has no {name.strip()!r}", fix="give " + ", ".join(keys).replace("_", "-") + " as KEY=VALUE"
            )
        try:
            values[key] = keys[key](value.strip())
        except ValueError:
            raise UsageError(f"--stage {name.strip()}: {value!r} is not a valid {keys[key].__name__}") from None
    return values


def stage_configs(config: ConfigT) -> list[ConfigT]:
    """A configuration for each of `config.stages`, or `config` alone without any. Raises UsageError.

    Stage N draws its rows with seed + N, so that a repeated length uses other rows.
    """
    stages = [parse_stage(text, config.stage_keys) for text in config.stages]
    if not stages:
        return [config]
    return [replace(config, **stage, stages=(), seed=config.seed + n) for n, stage in enumerate(stages)]


def resolve_stages(resolve: Callable[[ConfigT], Any], configs: Sequence[ConfigT]) -> list[Any]:
    """Check every stage, independent of the others: its rows and positions do not depend on training."""
    jobs = []
    for number, config in enumerate(configs):
        try:
            jobs.append(resolve(config))
        except LvctxError as e:
            if len(configs) > 1:
                e.args = (f"stage {number + 1}: {e}",)
            raise
    return jobs


def run_stages(
    configs: Sequence[ConfigT],
    jobs: Sequence[StageJob],
    resolve: Callable[[ConfigT], StageJob],
    parallel: ParallelConfig,
    control: RunControl,
) -> None:
    """Run the stages that are not finished; none if `control.out` is finished. `jobs` are those of `resolve_stages`."""
    if len(jobs) == 1:
        run_training(jobs[0].task(), parallel, control)
        return
    provenance = _run_provenance(jobs)
    final = jobs[-1].as_final_stage(jobs[0], provenance).provenance
    if is_finished(control.out, final, resume=control.resume, force=control.force):
        return
    model = configs[0].model
    for number, config in enumerate(configs, start=1):
        last = number == len(configs)
        job = resolve(replace(config, model=model))
        if last:
            job = job.as_final_stage(jobs[0], provenance)

        out = control.out if last else control.out / f"stage-{number}"
        again = control.force or control.resume == "never"
        on_progress = _labelled(control.on_progress, f"stage {number}/{len(configs)}")
        stage_control = RunControl(
            out=out,
            force=again,
            on_progress=on_progress,
            on_step=control.on_step,
            command=control.command if last else "",
        )
        run_training(job.task(), parallel, stage_control)
        model = str(out)


def _labelled(on_progress: OnProgress, label: str) -> OnProgress:
    return lambda done, total, note: on_progress(done, total, f"{label}, {note}")


def _run_provenance(jobs: Sequence[StageJob]) -> Provenance:
    """What identifies all stages as one run."""
    parts = [job.provenance for job in jobs]
    data = {f"data-{n + 1}": part.inputs["data"] for n, part in enumerate(parts) if "data" in part.inputs}
    return replace(
        parts[0],
        config={"stages": [dict(part.config) for part in parts]},
        inputs={"model": parts[0].inputs["model"], **data},
    )
