"""Packs chat samples of several kinds into rows of about one length: GIRAFFE's data recipe (section 2, ETVLM).

Every sample is tokenized once, with its visual tokens counted, and stored on disk; then samples are chosen so that
every kind has its proportion of the tokens, and packed whole into rows by best-fit decreasing. Memory holds a few
numbers per sample, whatever its length. A run that was killed starts over.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.jsonl_log import write_jsonl
from lvctx.artifacts.manifest import MANIFEST, Provenance, open_output, read_manifest, write_manifest
from lvctx.artifacts.store import fingerprint, sha256_file
from lvctx.config import OnProgress, hashed_fields
from lvctx.data.bin_packing import best_fit_decreasing
from lvctx.data.chat_encoding import CHATML
from lvctx.data.chat_mixture import choose_samples, describe_shortage, largest_blend
from lvctx.data.chat_sample_encoder import ChatSampleEncoder
from lvctx.data.chat_sample_store import ChatSampleStore
from lvctx.data.conversations import parse_conversation
from lvctx.data.hub import hub_commit, hub_datasets
from lvctx.data.pack_chat_config import PackChatConfig
from lvctx.data.pack_chat_stats import NOT_NEEDED, SHORT_VIDEO, TOO_LONG, packing_stats
from lvctx.data.packed import shard_name
from lvctx.data.packed_chat import lines_name, write_chat_shard
from lvctx.data.records import is_dataset
from lvctx.data.row_images import chat_records
from lvctx.data.row_packing import uniform
from lvctx.errors import InputError, UsageError
from lvctx.models.chat_template import chat_encoder
from lvctx.models.loading import load_tokenizer, resolve_model
from lvctx.models.loss import IGNORED
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling
from lvctx.vlm.registry import family_of, open_vlm
from lvctx.vlm.token_count import VisualRule

log = logging.getLogger(__name__)

SHARES = {"text": 0.20, "image": 0.25, "interleaved": 0.25, "video": 0.30}
"""GIRAFFE's proportions of the kinds, by tokens."""
LEFT_OUT = "left-out.jsonl"


@dataclass(frozen=True, kw_only=True)
class PackChatJob:
    """A checked configuration with the values resolved from it."""

    config: PackChatConfig
    """As given."""
    sources: Mapping[str, Sequence[Path]]
    """Files of each kind that is given."""
    mix: dict[str, float]
    """Proportion of the tokens of each of those kinds, summing to 1."""
    tokenizer: Any
    """Tokenizer with the chosen template."""
    rule: VisualRule | None
    """Counts the model's visual tokens; None for a language model."""
    provenance: Provenance
    """What identifies the run."""

    def describe(self) -> dict[str, Any]:
        """The inputs and outputs of a run, for a dry run."""
        files = {kind: [str(path) for path in paths] for kind, paths in self.sources.items()}
        rule = type(self.rule).__name__ if self.rule else None
        return {"path": str(self.config.out), **self.provenance.config, "sources": files, "rule": rule}


def plan_pack_chat(config: PackChatConfig) -> PackChatJob:
    """Check the inputs and resolve the defaults; reads no weights and no samples. Raises UsageError and InputError."""
    paths_by_kind = {kind: getattr(config, kind) for kind in SHARES}
    sources = {kind: paths for kind, paths in paths_by_kind.items() if paths}
    if not sources:
        raise UsageError("no samples", fix=f"give one of {', '.join('--' + kind for kind in SHARES)}")
    for paths in sources.values():
        for path in paths:
            if not path.is_file() and not is_dataset(path):
                raise InputError("no such file", where=path)
    mix = _proportions(config.mix, sources)
    parsed_hybrid = Hybrid.parse(config.hybrid) if config.hybrid else None
    sampling = VideoSampling(hybrid=parsed_hybrid, hybrid_mode=config.hybrid_mode)
    hybrid = asdict(sampling.resolution) if sampling.resolution else None
    path = resolve_model(config.model, weights=False)
    tokenizer = load_tokenizer(path)
    if config.template == "chatml":
        if None in (chatml_ids := [tokenizer.get_vocab().get(t) for t in ("<|im_start|>", "<|im_end|>")]):
            fix = "use the tokenizer's with --template own"
            raise InputError(f"no ChatML tokens {chatml_ids}", where=config.model, fix=fix)
        tokenizer.chat_template = CHATML
    elif tokenizer.chat_template is None:
        raise InputError("no chat template", where=config.model, fix="use --template chatml, or an instruct model")
    chat_encoder(tokenizer)
    rule = open_vlm(path, weights=False).token_rule(sampling) if family_of(path) else None
    settings = ("preprocessor_config.json", *(("processor_config.json",) if rule else ()))
    small = [path / name for name in ("tokenizer.json", "config.json", *settings)]
    inputs = {"model": " ".join(sha256_file(p) for p in small if p.is_file())}
    inputs |= {kind: " ".join(map(_identify, paths)) for kind, paths in sources.items()}
    hashed = hashed_fields(config)
    del hashed["hybrid_mode"]  # a part of `hybrid`
    provenance = Provenance(
        schema=schemas.CHAT,
        command="pack-chat",
        config={**hashed, "mix": mix, "hybrid": hybrid},
        inputs=inputs,
        seed=config.seed,
    )
    return PackChatJob(config=config, sources=sources, mix=mix, tokenizer=tokenizer, rule=rule, provenance=provenance)


def _identify(path: Path) -> str:
    """The hash of a file or a directory, the commit of a dataset on the hub."""
    return fingerprint(path) if path.exists() else hub_commit(str(path))


def _proportions(mix: Mapping[str, float] | None, sources: Mapping[str, Any]) -> dict[str, float]:
    """Proportions of the kinds that have samples, summing to 1."""
    if mix is None:
        mix = {kind: SHARES[kind] for kind in sources}
        if len(mix) < len(SHARES):
            log.warning("no source of %s: the others share its part", ", ".join(k for k in SHARES if k not in mix))
    for kind in mix:
        if mix[kind] and kind not in sources:
            raise UsageError(f"--mix has a share for {kind}, but --{kind} is not given", fix=f"add --{kind} FILE")
    for kind in sources:
        if kind not in mix:
            raise UsageError(f"--{kind} is not in --mix", fix=f"write {kind}=SHARE into it")
    total = sum(mix.values())
    if total <= 0:
        raise UsageError("the shares of --mix sum to 0")
    return {kind: mix[kind] / total for kind in SHARES if kind in sources}


def run_pack_chat(
    job: PackChatJob, *, resume: str = "auto", force: bool = False, on_progress: OnProgress
) -> dict[str, Any]:
    """Write the directory and return its manifest; a finished one is not changed."""
    out = job.config.out
    with open_output(out, job.provenance, resume=resume, force=force) as unfinished:
        if unfinished and resume == "must":
            raise InputError("unfinished, and this command cannot resume", where=out, fix="drop --resume must")
        if unfinished:
            _start_over(job, on_progress)
    return read_manifest(out)


def _start_over(job: PackChatJob, on_progress: OnProgress) -> None:
    """Remove what a killed run left, and pack."""
    out = job.config.out
    for pattern in (MANIFEST, "shard-*", ".*.partial"):
        for path in out.glob(pattern):
            path.unlink()
    with ChatSampleStore(out) as samples:
        _ChatPacker(job, samples, on_progress).run()


class _ChatPacker:
    """One run: read all samples into the store, choose, pack, write."""

    def __init__(self, job: PackChatJob, samples: ChatSampleStore, on_progress: OnProgress) -> None:
        self.job, self.config, self.out, self.on_progress = job, job.config, job.config.out, on_progress
        self.samples = samples
        self.left_out: list[dict[str, Any]] = []
        self.encoder = ChatSampleEncoder(
            job.tokenizer,
            job.rule,
            media=job.config.media,
            video_fps=job.config.video_fps,
            max_frames=job.config.max_frames,
            allow_partial=job.config.allow_partial,
        )

    def run(self) -> None:
        for kind, paths in self.job.sources.items():
            for path in paths:
                self._read(kind, path)
        rows = self._pack(self._choose())
        shard_rows, facts = self._write(rows)
        packed = np.zeros(len(self.samples), bool)
        packed[[number for row in rows for number in row]] = True
        for number in np.flatnonzero(~packed).tolist():
            sample = self.samples.facts(number)
            self.left_out.append({k: sample[k] for k in ("source", "kind", "tokens")} | {"why": NOT_NEEDED})
        write_jsonl(self.out / LEFT_OUT, self.left_out)
        names = [name(i) for i in range(len(shard_rows)) for name in (shard_name, lines_name)]
        stats = packing_stats(self.config, self.job.mix, self.samples, packed, self.left_out, rows=len(rows))
        facts["datasets"] = hub_datasets(path for paths in self.job.sources.values() for path in paths)
        write_manifest(self.out, self.job.provenance, [*names, LEFT_OUT], **stats, shard_rows=shard_rows, **facts)

    def _read(self, kind: str, path: Path) -> None:
        """Tokenize a file's samples into the store, or record why one is left out."""
        where = None
        for record in chat_records(path, self.config.media):
            where = record.where
            try:
                conversation = parse_conversation(record)
                if kind == "text" and conversation.media:
                    raise InputError("an image or video in a --text source", where=where, fix="use another source kind")
                ids, labels, media = self.encoder.encode(conversation)
            except InputError as e:
                if not self.config.skip_malformed:
                    raise
                self.left_out.append({"source": where, "kind": kind, "tokens": None, "why": str(e)})
                continue
            seconds = (item["duration"] for item in media if item["kind"] == "video")
            if min(seconds, default=inf) < self.config.min_video_seconds:
                self.left_out.append({"source": where, "kind": kind, "tokens": len(ids), "why": SHORT_VIDEO})
                continue
            if len(ids) > self.config.target_length:
                self.left_out.append({"source": where, "kind": kind, "tokens": len(ids), "why": TOO_LONG})
                log.warning("%s: %s tokens, longer than a row: left out", where, f"{len(ids):,}")
                continue
            self.samples.add(ids, labels, {"source": where, "kind": kind, "tokens": len(ids), "media": media})
            self.on_progress(len(self.samples), 0, f"samples read, {path.name}")
        if where is None:
            raise InputError("the file has no sample", where=path)

    def _choose(self) -> np.ndarray:
        """Numbers of the samples to pack, ascending."""
        config, mix, kinds = self.config, self.job.mix, np.array(self.samples.kinds)
        numbers = {kind: np.flatnonzero(kinds == kind) for kind in mix}
        empty = [kind for kind in mix if mix[kind] and not len(numbers[kind])]
        if empty:
            raise InputError(f"no sample of {', '.join(empty)} can be packed", fix="check omitted samples, or --mix")
        all_lengths = np.array(self.samples.lengths, np.int64)
        lengths = {kind: all_lengths[numbers[kind]] for kind in mix}
        limits: dict[str, Any] = {"long_share": config.long_share, "long_over": config.long_over}
        largest = largest_blend(lengths, mix, **limits)
        tokens = config.tokens or largest
        if tokens > largest:
            shortage = describe_shortage(lengths, mix, tokens=tokens, **limits)
            raise InputError(
                f"{tokens:,} tokens cannot be met ({shortage})",
                fix=f"--tokens {largest} is the most that mix and long share allow, or add samples",
            )
        selected = choose_samples(lengths, mix, tokens=tokens, seed=config.seed, **limits)
        chosen = np.sort(np.concatenate([numbers[kind][selected[kind]] for kind in mix]))
        if not len(chosen):
            raise InputError(
                f"no sample fits into the shares of {tokens:,} tokens", fix="add samples or change --long-share"
            )
        return chosen

    def _pack(self, chosen: np.ndarray) -> list[list[int]]:
        """Sample numbers of every row; the order of rows, and of samples in a row, is drawn from the seed."""
        draws = uniform(self.config.seed, np.arange(len(self.samples)))
        shuffled = chosen[np.argsort(draws[chosen], kind="stable")]
        packed = best_fit_decreasing([self.samples.lengths[n] for n in shuffled], self.config.target_length)
        rows = [sorted((int(shuffled[i]) for i in row), key=lambda n: draws[n]) for row in packed]
        return sorted(rows, key=lambda row: draws[row[0]])

    def _write(self, rows: list[list[int]]) -> tuple[list[int], dict[str, Any]]:
        """Write all shards; returns the rows of each, and the numbers of counted labels and of visual tokens."""
        metadata = self.job.provenance.to_metadata()
        shard_rows: list[int] = []
        counted = visual = 0
        for shard in self._shards(rows):
            tensors, lines = self._shard(shard)
            write_chat_shard(self.out, len(shard_rows), tensors, lines, metadata)
            counted += int(np.count_nonzero(tensors["labels"] != IGNORED))
            visual += sum(item["tokens"] for line in lines for item in line["media"])
            shard_rows.append(len(shard))
            self.on_progress(sum(shard_rows), len(rows), "rows written")
        return shard_rows, {"labels_counted": counted, "visual_tokens": visual}

    def _shards(self, rows: list[list[int]]) -> Iterator[list[list[int]]]:
        """The rows of each shard: as many as reach `shard_tokens`."""
        shard: list[list[int]] = []
        tokens = 0
        for row in rows:
            shard.append(row)
            tokens += sum(self.samples.lengths[number] for number in row)
            if tokens >= self.config.shard_tokens:
                yield shard
                shard, tokens = [], 0
        if shard:
            yield shard

    def _shard(self, rows: list[list[int]]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """Tensors and lines of a shard; see `data.packed_chat`."""
        ids, labels, lines, row_offsets, sample_offsets, starts = [], [], [], [0], [0], []
        for i, row in enumerate(rows):
            at = 0
            for number in row:
                sample_ids, sample_labels = self.samples.tokens(number)
                ids.append(sample_ids)
                labels.append(sample_labels)
                lines.append(_placed(self.samples.facts(number), i, at))
                starts.append(at)
                at += len(sample_ids)
            row_offsets.append(row_offsets[-1] + at)
            sample_offsets.append(len(starts))
        tensors = {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "row_offsets": np.array(row_offsets, np.int64),
            "sample_offsets": np.array(sample_offsets, np.int64),
            "sample_starts": np.array(starts, np.int32),
        }
        return tensors, lines


def _placed(line: dict[str, Any], row: int, start: int) -> dict[str, Any]:
    """A sample's line with its position in the row."""
    for item in line["media"]:
        item["at"] += start
        for block in item["blocks"]:
            block[0] += start
    return {"source": line["source"], "kind": line["kind"], "row": row, "start": start, **line}
