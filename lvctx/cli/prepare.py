"""Commands that prepare training data: `pack-text` and `pack-chat`."""

from lvctx.artifacts import schemas
from lvctx.cli.options import RunOptions, command
from lvctx.cli.output import artifact_row, emit, progress
from lvctx.stages.pack_text_config import PackTextConfig


@command(
    "pack-text",
    "lvctx pack-text essays -o rows --tokenizer lm --seq-len 256 --keep-short 1",
    "lvctx pack-text essays -o rows-long --tokenizer lm --seq-len 1024 --min-long 2000 --dry-run",
)
def pack_text(config: PackTextConfig, run: RunOptions) -> None:
    """Tokenize documents and pack them into fixed-length rows.

    Keeps all long documents, subsamples short ones, and preserves the proportions of the sources.

    A special token that is written in a document (<|endoftext|>) is encoded as text. If the tokenizer cannot encode it
    as text (Unigram with it among its pieces), the document is malformed.
    """
    with progress("pack-text", "loading the tokenizer and listing the input") as on_progress:
        from lvctx.stages.pack_text import plan_pack_text, run_pack_text

        job = plan_pack_text(config)
        if not run.dry_run:
            manifest = run_pack_text(job, resume=run.resume, force=run.force, report=on_progress)
    if run.dry_run:
        emit({"dry_run": True, **job.describe()})
        return
    facts = {key: manifest[key] for key in ("rows", "tokens", "seq_len")}
    emit(artifact_row(schemas.PACKED, config.out, facts))
