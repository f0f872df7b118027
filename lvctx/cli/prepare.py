"""Commands that prepare training data: `pack-text` and `pack-chat`."""

from lvctx.artifacts import schemas
from lvctx.cli.options import RunOptions, command
from lvctx.cli.output import artifact_row, emit, progress
from lvctx.data.pack_chat_config import PackChatConfig
from lvctx.data.pack_text_config import PackTextConfig


@command(
    "pack-text",
    "lvctx pack-text essays -o rows --tokenizer lm --seq-len 256 --keep-short 1",
    "lvctx pack-text essays -o rows-long --tokenizer lm --seq-len 1024 --min-long 2000 --dry-run",
)
def pack_text(config: PackTextConfig, run: RunOptions) -> None:
    """Tokenize documents and pack them into fixed-length rows.

    Keeps all long documents, subsamples short ones, and preserves the proportions of the sources.

    A special token in a document's text (<|endoftext|>) is encoded as text. If the tokenizer cannot encode it
    as text (Unigram with it among its pieces), the document is malformed.
    """
    with progress("pack-text", "loading the tokenizer and listing the input") as on_progress:
        from lvctx.data.pack_text import plan_pack_text, run_pack_text

        job = plan_pack_text(config)
        if not run.dry_run:
            manifest = run_pack_text(job, resume=run.resume, force=run.force, on_progress=on_progress)
    if run.dry_run:
        emit({"dry_run": True, **job.describe()})
        return
    facts = {key: manifest[key] for key in ("rows", "tokens", "seq_len")}
    emit(artifact_row(schemas.PACKED, config.out, facts))


@command(
    "pack-chat",
    "lvctx pack-chat --model vlm --image shapes/full.json --media shapes --long-share any --target-length 2048 -o chat",
    "lvctx pack-chat --model vlm --image shapes/full.json --media shapes --target-length 4096 -o x --dry-run",
)
def pack_chat(config: PackChatConfig, run: RunOptions) -> None:
    """Mix chat samples with text, images and videos and pack them into long rows.

    No sample is truncated: a row holds whole samples.

    The loss is on the assistant's answers and the end of their turns, or on the text that the chat template marks as
    generated; a template that rewrites earlier turns is an error. A special token in a turn's text (<|im_end|>), and
    <image> or <video> in a sample without one, is encoded as text. An assistant turn before the first question is left
    out.

    A stopped run starts over: no partial result is kept.
    """
    with progress("pack-chat", "loading the tokenizer") as on_progress:
        from lvctx.data.pack_chat import plan_pack_chat, run_pack_chat

        job = plan_pack_chat(config)
        if not run.dry_run:
            manifest = run_pack_chat(job, resume=run.resume, force=run.force, on_progress=on_progress)
    if run.dry_run:
        emit({"dry_run": True, **job.describe()})
        return
    facts = {key: manifest[key] for key in ("rows", "tokens", "samples", "target_length", "fill")}
    facts["long_share"] = manifest["long"]["share_achieved"]
    emit(artifact_row(schemas.CHAT, config.out, facts))
