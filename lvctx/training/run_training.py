"""The life cycle of every training: lock, ranks, sharding, resuming, gathering, saving, manifest.

A training is a `TrainingTask`; this module runs one on one process or under torchrun, from start or from a checkpoint.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from lvctx.artifacts.manifest import MANIFEST, is_finished, open_output, verify_files, write_manifest
from lvctx.artifacts.model_config import CONFIG_FILE
from lvctx.errors import UsageError
from lvctx.models.adapter import save_adapter
from lvctx.models.card import CARD
from lvctx.models.card_metadata import write_card
from lvctx.models.lora import Gather
from lvctx.parallel import checkpoint
from lvctx.parallel.block_attention import cudnn_first
from lvctx.parallel.context import ParallelContext, open_context
from lvctx.parallel.fsdp import gathering, shard_model
from lvctx.training.activations import checkpoint_layers, map_large_blocks
from lvctx.training.compiled_layers import check_compiler, compile_layers
from lvctx.training.memory_model import Recomputation
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
    ranks: dict[str, Any] = {"cp": parallel.cp, "cp_kind": parallel.cp_kind, "sharded": parallel.offload}
    opened = open_context(device=parallel.device, dtype=parallel.dtype, **ranks)
    with opened as context, ExitStack() as stack:
        if parallel.compile and task.train_config.steps:
            check_compiler(context.device)
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
        map_large_blocks()  # so that what the steps have freed is not held while the weights are gathered and written
        with gathering(trainable.model, context) as gather:
            if gather is not None:
                _save_result(task, trainable, control, metrics, gather)
                checkpoint.remove(out)
        context.barrier()


def _train(
    task: TrainingTask[Any], parallel: ParallelConfig, control: RunControl, context: ParallelContext
) -> tuple[TrainableModel, list[dict[str, Any]]]:
    """The trained model, sharded if there is a mesh, and on rank 0 the rows of metrics.jsonl."""
    steps = task.train_config.steps
    trainable = task.load("meta" if context.mesh is not None or not steps else context.device)
    if not steps:
        return trainable, []
    choice = parallel.checkpoint_activations
    if trainable.decoder is not None and choice != "none":
        tiles = Recomputation(mlp_tiles=choice == "tiles")
        recomputation = task.recomputation(context, parallel) if choice == "auto" else tiles
        if recomputation.mlp_tiles and parallel.compile:
            raise UsageError("--compile does not support tiles", where="--checkpoint-activations", fix="drop --compile")
        checkpoint_layers(trainable.decoder, recomputation, offload=parallel.offload_activations)
    module = task.build(trainable, context, parallel)
    layers = trainable.decoder.layers if trainable.decoder is not None else ()
    if parallel.compile and layers:
        compile_layers(trainable.decoder)
    shard_model(module, layers, context, offload=parallel.offload)
    task.before_steps(control.out, control.on_progress)
    with cudnn_first(context.device) if task.equal_lengths else nullcontext():
        metrics = train(task, trainable.groups, context, control)
    return trainable, metrics


@torch.no_grad()
def _save_result(
    task: TrainingTask[Any],
    trainable: TrainableModel,
    control: RunControl,
    metrics: Sequence[dict[str, Any]],
    gather: Gather,
) -> None:
    """Write the LoRA if there is one, the model with it merged, its card, and the manifest."""
    out = control.out
    if trainable.lora is not None:
        longest = task.longest_sample(metrics)
        save_adapter(out, trainable.model, trainable.lora, task.provenance, longest=longest, gather=gather)
    files, facts = task.save(trainable.model.eval(), out, metrics, gather)
    if metrics:
        facts["tokens"] = sum(row["tokens"] for row in metrics)
    models = [path for path in task.inputs if (path / CONFIG_FILE).is_file()]
    write_card(out, task.provenance, facts, sources=models, datasets=task.datasets, command=control.command)
    write_manifest(out, task.provenance, sorted({*files, CARD}), **facts)
