"""The life cycle of every training: lock, ranks, sharding, resuming, gathering, saving, manifest.

A training is a `TrainingTask`; this module runs one on one process or under torchrun, from start or from a checkpoint.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from lvctx.artifacts.manifest import MANIFEST, is_finished, open_output, verify_files, write_manifest
from lvctx.models.adapter import save_adapter
from lvctx.models.lora import merge_lora
from lvctx.parallel import checkpoint
from lvctx.parallel.block_attention import cudnn_first
from lvctx.parallel.context import ParallelContext, open_context
from lvctx.parallel.fsdp import gather_into, shard_model
from lvctx.training.activations import checkpoint_layers
from lvctx.training.parallel_config import ParallelConfig, RunControl
from lvctx.training.task import TrainableModel, TrainingTask
from lvctx.training.trainer import train


def run_training(task: TrainingTask[Any], parallel: ParallelConfig, control: RunControl) -> None:
    """Train (or resume) and write the model to `control.out`; a finished one is not changed.

    Under torchrun every rank calls it, and rank 0 writes. Raises InputError for the output of another run and for
    damaged inputs, and the task's errors.
    """
    out = control.out
    if is_finished(out, task.provenance, resume=control.resume, force=control.force):
        return
    opened = open_context(device=parallel.device, cp=parallel.cp, dtype=parallel.dtype, sharded=parallel.offload)
    with opened as context, ExitStack() as stack:
        unfinished = True
        if context.rank == 0:
            output = open_output(out, task.provenance, resume=control.resume, force=control.force)
            unfinished = stack.enter_context(output)
            if control.force or control.resume == "never":
                checkpoint.remove(out)
                task.clear(out)
                (out / MANIFEST).unlink(missing_ok=True)
            for path in task.inputs if unfinished else ():
                control.on_progress(0, task.train_config.steps, f"checking {path}")
                verify_files(path)
        if not context.gather(unfinished)[0]:
            return
        trainable, metrics = _train(task, parallel, control, context)
        if trainable is not None and context.rank == 0:
            _save_result(task, trainable, out, metrics)
            checkpoint.remove(out)
        context.barrier()


def _train(
    task: TrainingTask[Any], parallel: ParallelConfig, control: RunControl, context: ParallelContext
) -> tuple[TrainableModel | None, list[dict[str, Any]]]:
    """The trained model, unsharded, and the rows of metrics.jsonl; None on other ranks than 0 if it was sharded."""
    trainable = task.load("cpu" if context.mesh is not None else context.device)
    if not task.train_config.steps:
        return trainable, []
    if trainable.decoder is not None and parallel.checkpoint_activations:
        checkpoint_layers(trainable.decoder, offload=parallel.offload_activations)
    module = task.build(trainable, context, parallel)
    layers = trainable.decoder.layers if trainable.decoder is not None else ()
    shard_model(module, layers, context, offload=parallel.offload)
    task.before_steps(control.out, control.on_progress)
    with cudnn_first(context.device) if task.equal_lengths else nullcontext():
        metrics = train(task, trainable.groups, context, control)
    if context.mesh is None:
        return trainable, metrics
    unsharded = task.load("cpu") if context.rank == 0 else None
    gather_into(unsharded.model if unsharded else None, trainable.model)
    return unsharded, metrics


def _save_result(
    task: TrainingTask[Any], trainable: TrainableModel, out: Path, metrics: Sequence[dict[str, Any]]
) -> None:
    """Write the LoRA if there is one, the model with it merged, and the manifest."""
    if trainable.lora is not None:
        longest = task.longest_sample(metrics)
        save_adapter(out, trainable.model, trainable.lora, task.provenance, longest=longest)
        merge_lora(trainable.lora)  # in place
    files, facts = task.save(trainable.model.eval(), out, metrics)
    write_manifest(out, task.provenance, files, **facts)
