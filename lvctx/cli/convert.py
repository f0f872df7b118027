"""Commands that convert models: `import-longva` and `export_model`."""

from dataclasses import replace

from lvctx.artifacts import schemas
from lvctx.cli.options import RunOptions, card_command, command
from lvctx.cli.output import artifact_row, emit, progress
from lvctx.models.convert_config import ExportConfig, ImportLongvaConfig


@command(
    "import-longva",
    "lvctx import-longva longva-released -o longva",
    "lvctx import-longva longva-released --context 224000 --dry-run -o longva-224k",
)
def import_longva(config: ImportLongvaConfig, run: RunOptions) -> None:
    """Convert a released LongVA checkpoint for transformers and vLLM.

    LongVA's baseline LLaVA-NeXT-Video-7B-32K is converted too. The result is a model directory as written by align.
    Every tensor of the checkpoint is converted or listed.
    """
    with progress("import-longva", "checking the checkpoint") as on_progress:
        from lvctx.models.import_longva import plan_import_longva, run_import_longva

        job = plan_import_longva(config)
        if not run.dry_run:
            made_by = card_command("import-longva", config)
            run_import_longva(job, command=made_by, resume=run.resume, force=run.force, on_progress=on_progress)
    if run.dry_run:
        emit({"dry_run": True, "path": str(config.out), **job.facts})
    else:
        emit(artifact_row(schemas.MODEL, config.out, job.facts))


@command("export", "lvctx export vlm --to hf -o vlm-hf", "lvctx export vlm --card --results videomme -o card")
def export_model(config: ExportConfig, run: RunOptions) -> None:
    """Write a model in the format of another program, add results to its card, and upload it.

    import-longva converts the result of --to llava back, bit for bit.
    """
    with progress("export", "checking the model") as on_progress:
        from lvctx.eval.card_results import read_card_results
        from lvctx.models.export import plan_export, run_export
        from lvctx.models.hub_upload import check_upload, upload_model

        if config.push_to_hub is not None:
            check_upload(config.push_to_hub)
        job = plan_export(config, card_command("export", replace(config, push_to_hub=None)))
        if config.results:
            job = replace(job, results=read_card_results(config.results, job.source))
        if not run.dry_run:
            row = run_export(job, resume=run.resume, force=run.force, on_progress=on_progress)
            if config.push_to_hub is not None:
                on_progress(0, 0, f"uploading to {config.push_to_hub}")
                row |= upload_model(config.out, config.push_to_hub)
    emit({"dry_run": True, "path": str(config.out), **job.facts} if run.dry_run else row)
