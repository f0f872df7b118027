"""Pack documents into rows of token ids of one length: the paper's length-upsampled corpus (LongVA section 3.1).

One process reads, others tokenize, this one selects and packs. If budgets are known from the start (`--tokens`, or no
mix), rows are written at once; if they depend on the whole input (its own shares, or as much as the scarcest source
allows), the documents kept by the length rule first go to spool parts beside the shards.

Every shard and part stores where it ends in the input and the counts up to there. A killed run resumes after the last
complete one; since every decision is a function of seed and position, its bytes equal those of an uninterrupted run.
"""

import itertools
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from lvctx.artifacts import schemas
from lvctx.artifacts.manifest import MANIFEST, Provenance, open_output, read_manifest, write_manifest
from lvctx.config import OnProgress, hashed_fields
from lvctx.data import mixture
from lvctx.data.document_fields import UNNAMED, Fields
from lvctx.data.documents import Corpus, Place
from lvctx.data.hub import hub_datasets
from lvctx.data.pack_text_config import PackTextConfig
from lvctx.data.packed import read_state, shard_name, write_token_shard
from lvctx.data.row_packing import LengthRule, PackingStats, ShardBuffer, bin_names, take_all, take_budgets
from lvctx.data.spool import Spool, part_name
from lvctx.data.tokenization import UNREADABLE, Policy, Tokens, tokenize
from lvctx.data.tokenizer import TokenizerFile, find_tokenizer
from lvctx.errors import InputError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackTextJob:
    """A checked configuration with the values resolved from it."""

    config: PackTextConfig
    """As given."""
    mix: dict[str, float] | str
    """Proportions of the sources, summing to 1, or the name of a rule; see `data.mixture`."""
    corpus: Corpus
    """The input."""
    tokenizer: TokenizerFile
    """The loaded tokenizer, with the separator put before each document."""
    workers: int
    """Tokenizer processes."""
    provenance: Provenance
    """What identifies the run."""

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard."""
        return max(1, self.config.shard_tokens // self.config.seq_len)

    def describe(self) -> dict[str, Any]:
        """The inputs and outputs of a run, for a dry run."""
        kinds = [part.kind for part in self.corpus.parts]
        return {
            "path": str(self.config.out),
            **self.provenance.config,
            "separator_token": self.tokenizer.separator_token,
            "inputs": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "input_bytes": self.corpus.size,
            "output_bytes": 4 * self.config.tokens if self.config.tokens else None,
            "workers": self.workers,
        }


def plan_pack_text(config: PackTextConfig) -> PackTextJob:
    """Check the inputs and resolve the defaults. Raises UsageError and InputError."""
    mix = mixture.load_mix(config.mix)
    if config.seq_len < 2:
        raise UsageError(f"--seq-len {config.seq_len} is less than 2", fix="a row needs at least two tokens")
    if config.tokens is not None and config.tokens < config.seq_len:
        raise UsageError(f"--tokens {config.tokens} is less than one row of {config.seq_len}", fix="raise it")
    tokenizer = find_tokenizer(config.tokenizer, config.separator)
    fields = Fields(text=config.text_field, source=config.source_field)
    corpus = Corpus(config.inputs, fields=fields, split=config.split)
    provenance = Provenance(
        schema=schemas.PACKED,
        command="pack-text",
        config={**hashed_fields(config), "mix": mix, "separator": tokenizer.separator},
        inputs={"tokenizer": tokenizer.sha256, "documents": corpus.fingerprint()},
        seed=config.seed,
    )
    workers = config.workers or len(os.sched_getaffinity(0))
    return PackTextJob(
        config=config, mix=mix, corpus=corpus, tokenizer=tokenizer, workers=workers, provenance=provenance
    )


def run_pack_text(
    job: PackTextJob, *, resume: str = "auto", force: bool = False, on_progress: OnProgress
) -> dict[str, Any]:
    """Write the packed directory, or continue it, and return its manifest; a finished one is not changed."""
    out = job.config.out
    with open_output(out, job.provenance, resume=resume, force=force) as unfinished:
        if unfinished:
            _Packer(job, on_progress).run(resume=resume, force=force)
    return read_manifest(out)


class _Packer:
    """One run: its state, and its two ways of writing rows."""

    def __init__(self, job: PackTextJob, on_progress: OnProgress) -> None:
        self.job, self.config, self.out, self.on_progress = job, job.config, job.config.out, on_progress
        self.rule = LengthRule(min_long=job.config.min_long, keep_short=job.config.keep_short, seed=job.config.seed)
        self.stats = PackingStats()
        self.mix: dict[str, float] | str = job.mix
        self.budgets: dict[str, int] = {}
        self.shards = 0
        self.buffer = ShardBuffer(rows=job.shard_rows, seq_len=job.config.seq_len)

    def run(self, *, resume: str, force: bool) -> None:
        """Pack from where an unfinished run stopped, or from the beginning."""
        if force:
            (self.out / MANIFEST).unlink(missing_ok=True)
        fresh = force or resume == "never"
        parts = [] if fresh else self._standing(part_name, rows=None)
        shards = [] if fresh else self._standing(shard_name, rows=self.job.shard_rows)
        spool = Spool(self.out, parts, part_tokens=self.config.shard_tokens, metadata=self._metadata)
        if shards and shards[-1]["spooled"] and not spool.complete:
            shards = []  # the parts that they came from were removed
        if resume == "must" and not shards and not parts:
            raise InputError("nothing to resume", where=self.out, fix="drop --resume must")
        self._remove_all_but({shard_name(i) for i in range(len(shards))} | {part_name(i) for i in range(len(parts))})
        self.shards = len(shards)
        last = shards[-1] if shards else None
        if last or parts:
            self.stats = PackingStats((last or parts[-1])["stats"])
            self._resolve_mix(self.stats.sources)
        if not spool.complete:
            place = last["place"] if last else parts[-1]["end"] if parts else Place(0, 0, 0)
            with closing(self._tokens(place)) as stream:
                tokens = stream if last or parts else self._begin(stream)
                if parts or (not last and self._needs_spool()):
                    self._fill_spool(tokens, spool)
                else:
                    self._write_rows(tokens, last)
        if spool.complete:
            self._set_budgets()
            self._write_rows(spool.read(last["place"][0] if last else 0), last, spooled=True)
        self._finish()

    def _begin(self, stream: Iterator[Tokens]) -> Iterator[Tokens]:
        """The same stream, after a check of its first readable documents."""
        first: list[Tokens] = []
        for tokens in stream:
            first.append(tokens)
            names = set(tokens.names) - {UNREADABLE}
            if names:
                self._resolve_mix(names)
                return itertools.chain(first, stream)
        raise InputError("no documents in the input", where=", ".join(p.name for p in self.job.corpus.parts[:3]))

    def _needs_spool(self) -> bool:
        return self.mix == mixture.KEEP or (isinstance(self.mix, dict) and self.config.tokens is None)

    def _tokens(self, start: Sequence[int]) -> Generator[Tokens, None, None]:
        """Tokenized chunks from a place in the input."""
        corpus, config = self.job.corpus, self.config
        stream = tokenize(
            corpus.chunks(Place(*start)),
            self.job.tokenizer,
            fields=corpus.fields,
            policy=Policy(invalid=config.invalid, skip_malformed=config.skip_malformed),
            workers=self.job.workers,
        )
        with closing(stream):
            for tokens in stream:
                yield tokens
                done = corpus.bytes_before(tokens.chunk.end)
                self.on_progress(done, corpus.size, f"{self.stats.documents:,} documents, {self.shards} shards")

    # Deciding

    def _resolve_mix(self, names: Iterable[str]) -> None:
        if self.mix == mixture.AUTO:
            self.mix = mixture.NONE if UNNAMED in names else dict(mixture.SLIMPAJAMA)
        if isinstance(self.mix, dict) and self.config.tokens is not None:
            self.budgets = mixture.apportion(self.config.tokens, self.mix)

    def _check_sources(self, tokens: Tokens) -> None:
        where = tokens.chunk.where
        for name in tokens.names:
            if isinstance(self.mix, dict) and name not in (*self.mix, UNREADABLE):
                what = f"source {name!r} is not" if name != UNNAMED else "documents without a source are not"
                fix = "--mix none, --mix keep or a --mix file that has it"
                raise InputError(f"{what} in the mix (which has {', '.join(self.mix)})", where=where, fix=fix)
            if self.job.mix == mixture.AUTO and self.mix == mixture.NONE and name not in (UNNAMED, UNREADABLE):
                what = f"source {name!r} after documents without one"
                raise InputError(what, where=where, fix="give --mix none, --mix keep or a --mix file")

    def _set_budgets(self) -> None:
        """Set budgets from the whole input: its own shares (before the length rule) or the mix's."""
        sources = self.stats.sources
        if self.mix == mixture.KEEP:
            total = sum(a.tokens for a in sources.values())
            self.mix = {s: a.tokens / total for s, a in sorted(sources.items()) if a.tokens}
        assert isinstance(self.mix, dict)
        available = {s: a.eligible for s, a in sources.items()}
        total, scarce = mixture.largest_total(available, self.mix)
        if not total:
            have = sources.get(scarce)
            detail = f"{have.documents} documents, none kept by the length rule" if have else "no documents"
            raise InputError(
                f"source {scarce!r} cannot meet its share of {self.mix[scarce]:.5f}: it has {detail}",
                fix="change --mix, or raise --keep-short",
            )
        self.budgets = mixture.apportion(self.config.tokens or total, self.mix)
        mixture.check_budgets(self.budgets, available, self.mix)

    def _take(self, tokens: Tokens, keep: np.ndarray, low: int) -> np.ndarray:
        if self.budgets:
            return take_budgets(tokens, keep, low, self.budgets, self.stats)
        room = None if self.config.tokens is None else self.config.tokens - self.stats.packed()
        return take_all(tokens, keep, low, room)

    def _enough(self) -> bool:
        return self.config.tokens is not None and self.stats.packed() >= self.config.tokens

    # Writing

    def _fill_spool(self, stream: Iterator[Tokens], spool: Spool) -> None:
        for tokens in stream:
            self._check_sources(tokens)
            keep = self.rule.keep(tokens.lengths(), self.stats.documents)
            self.stats.read(tokens, keep, 0, len(keep))
            spool.add(tokens, keep)
        spool.flush(complete=True)

    def _write_rows(self, stream: Iterator[Tokens], last: dict[str, Any] | None, *, spooled: bool = False) -> None:
        """Fill rows and write every shard that fills up; `last` is the state of the last complete one."""
        low, offset = (last["document"], last["offset"]) if last else (0, 0)
        for tokens in () if self._enough() else stream:
            count = len(tokens.status)
            if low >= count:  # the state is of a version that cut this input into longer chunks
                low -= count
                continue
            if spooled:
                keep = np.ones(count, bool)
            else:
                self._check_sources(tokens)
                keep = self.rule.keep(tokens.lengths(), self.stats.documents - low)
            take = self._take(tokens, keep, low)
            for k in np.flatnonzero(take).tolist():
                document = tokens.ids[tokens.starts[k] : tokens.starts[k] + take[k]]
                while True:
                    offset += self.buffer.put(document[offset:], begins=offset == 0)
                    if self.buffer.full:
                        self._enter(tokens, keep, take, slice(low, k), spooled)
                        low = k
                        state = {"place": tokens.chunk.start, "document": k, "offset": offset, "spooled": spooled}
                        self._write_shard(state)
                    if offset == len(document):
                        break
                offset = 0
            self._enter(tokens, keep, take, slice(low, count), spooled)
            low = 0
            if self._enough():
                break

    def _enter(self, tokens: Tokens, keep: np.ndarray, take: np.ndarray, part: slice, spooled: bool) -> None:
        if not spooled:
            self.stats.read(tokens, keep, part.start, part.stop)
        self.stats.pack(tokens, keep, take, part.start, part.stop)

    def _write_shard(self, state: dict[str, Any]) -> None:
        rows, offsets, starts = self.buffer.arrays()
        state = {**state, "rows": len(rows)}
        write_token_shard(self.out / shard_name(self.shards), rows, offsets, starts, self._metadata(state))
        self.shards += 1
        self.buffer.clear()

    def _metadata(self, state: dict[str, Any]) -> dict[str, str]:
        metadata = {**self.job.provenance.to_dict(), "state": {**state, "stats": self.stats.to_dict()}}
        return {"lvctx": json.dumps(metadata, sort_keys=True, separators=(",", ":"))}

    # Beginning and ending

    def _standing(self, name: Callable[[int], str], *, rows: int | None) -> list[dict[str, Any]]:
        """States of the complete shards or parts of this same run, up to the first gap or partial one."""
        states: list[dict[str, Any]] = []
        for number in itertools.count():
            stored = read_state(self.out / name(number))
            if stored is None or (rows is not None and stored["state"]["rows"] < rows):
                return states
            if stored["config_hash"] != self.job.provenance.config_hash:
                log.warning("%s: starting over, since the unfinished output is of another run", self.out)
                return []
            states.append(stored["state"])
        raise AssertionError

    def _remove_all_but(self, keep: set[str]) -> None:
        for pattern in ("shard-*.safetensors", part_name(0).replace("00000", "*"), ".*.partial"):
            for path in self.out.glob(pattern):
                if path.name not in keep:
                    path.unlink()

    def _finish(self) -> None:
        config, stats = self.config, self.stats
        if self.budgets and isinstance(self.mix, dict):
            mixture.check_budgets(self.budgets, {s: a.packed for s, a in stats.sources.items()}, self.mix)
        elif config.tokens is not None and not self._enough():
            fix = f"--tokens {stats.packed()} is the maximum; or raise --keep-short, or add input"
            raise InputError(f"the token budget cannot be met ({config.tokens - stats.packed()} tokens short)", fix=fix)
        tail = self.buffer.used % config.seq_len
        if tail and config.keep_tail:
            filler = np.full(config.seq_len - tail, self.job.tokenizer.separator, np.int32)
            self.buffer.put(filler, begins=True)
        full, rest = self.job.shard_rows, self.buffer.used // config.seq_len
        shard_rows = [full] * self.shards + ([rest] if rest else [])
        if not shard_rows:
            raise InputError(
                f"{stats.packed()} tokens of {stats.documents} documents passed the length rule: less than one row of "
                f"{config.seq_len}",
                fix="add input, raise --keep-short, lower --min-long or --seq-len, or --keep-tail",
            )
        if rest:
            self._write_shard({"last": True})
        facts = {
            "seq_len": config.seq_len,
            "rows": sum(shard_rows),
            "shard_rows": shard_rows,
            "tokens": stats.packed() - (0 if config.keep_tail else tail),
            "tail": {"tokens": tail, "kept": bool(tail and config.keep_tail)},
            "tokenizer": {"sha256": self.job.tokenizer.sha256, "vocabulary": self.job.tokenizer.vocabulary},
            "separator": {"id": self.job.tokenizer.separator, "token": self.job.tokenizer.separator_token},
            "length_bins": bin_names(),
            "sources": stats.report(self.mix if isinstance(self.mix, dict) else {}, self.budgets),
            "datasets": hub_datasets(self.job.config.inputs),
        }
        write_manifest(self.out, self.job.provenance, [shard_name(i) for i in range(len(shard_rows))], **facts)
        self._remove_all_but({shard_name(i) for i in range(len(shard_rows))})
