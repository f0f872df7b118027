"""Length-upsampled packing: the length rule, statistics, and rows of one length. Pure functions without files.

Fu et al. 2024 as used in LongVA (section 3.1): inside a source every document longer than `min_long` tokens is kept and
a shorter one with probability `keep_short`. Whether a document is kept is a hash of the seed and its number in the
input, not a draw from a shared stream, so the number of processes and a restart do not change it.

Shapes: N documents in a batch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lvctx.data.tokenization import MALFORMED, REPAIRED, SKIPPED, Tokens

BINS = 32
"""Bin b of a length histogram counts documents of 2^(b-1) to 2^b - 1 tokens; bin 0 the empty ones."""


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """Selects documents by their length."""

    min_long: int = 4096
    """In tokens; every longer document is kept. LongVA and Fu et al.: 4096."""
    keep_short: float = 0.1
    """Probability of keeping a document that is not longer. LongVA: 0.1."""
    seed: int = 0
    """Changes which short documents are kept."""

    def keep(self, lengths: np.ndarray, first: int) -> np.ndarray:
        """Which of N documents are kept, bool (N,). `first` is the number of the first in the whole input."""
        draws = uniform(self.seed, first + np.arange(len(lengths), dtype=np.uint64))
        return (lengths > 0) & ((lengths > self.min_long) | (draws < self.keep_short))


def uniform(seed: int, numbers: np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) for each uint64 number: SplitMix64 (Steele et al. 2014), at that index of its stream"""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        start = _mix(np.array([seed & (2**64 - 1)], np.uint64) + golden)
        x = _mix(start + (numbers.astype(np.uint64) + np.uint64(1)) * golden)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bins() -> list[int]:
    return [0] * BINS


@dataclass(kw_only=True)
class SourceStats:
    """Counts of one source. Documents are counted once; histograms have `BINS` bins."""

    documents: int = 0
    """Documents read."""
    tokens: int = 0
    """Tokens of these documents, without separators."""
    empty: int = 0
    """Documents without tokens."""
    repaired: int = 0
    """Documents with invalid UTF-8 replaced."""
    skipped: int = 0
    """Documents left out for invalid UTF-8."""
    malformed: int = 0
    """Malformed records left out."""
    too_short: int = 0
    """Documents left out by the length rule."""
    eligible: int = 0
    """Tokens kept by the length rule, including separators."""
    packed: int = 0
    """Tokens packed, including separators."""
    over_budget: int = 0
    """Documents left out because the source's budget was used up."""
    cut: int = 0
    """Documents truncated at the budget."""
    before_documents: list[int] = field(default_factory=_bins)
    """Documents read, by length."""
    before_tokens: list[int] = field(default_factory=_bins)
    """Their tokens."""
    after_documents: list[int] = field(default_factory=_bins)
    """Documents packed, by packed length."""
    after_tokens: list[int] = field(default_factory=_bins)
    """Their tokens."""


class PackingStats:
    """Counts of all sources; every shard stores them as JSON, so that a killed run can resume."""

    def __init__(self, stored: Mapping[str, Any] | None = None) -> None:
        self.sources: dict[str, SourceStats] = {s: SourceStats(**a) for s, a in (stored or {}).items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {source: asdict(one) for source, one in sorted(self.sources.items())}

    @property
    def documents(self) -> int:
        """Documents read so far: the number of the next one."""
        return sum(a.documents for a in self.sources.values())

    def packed(self) -> int:
        """Tokens packed so far."""
        return sum(a.packed for a in self.sources.values())

    def source(self, source: str) -> SourceStats:
        """The counts of a source, all 0 if it is new."""
        return self.sources.setdefault(source, SourceStats())

    def read(self, tokens: Tokens, keep: np.ndarray, low: int, high: int) -> None:
        """Count documents low..high of a batch as read; `keep` bool (N,) marks those that passed the length rule."""
        part = slice(low, high)
        lengths, status, keep = tokens.lengths()[part], tokens.status[part], keep[part]
        for one, mask in self._by_source(tokens, part):
            length, state, kept = lengths[mask], status[mask], keep[mask]
            bad = int(np.count_nonzero(state == SKIPPED)), int(np.count_nonzero(state == MALFORMED))
            nothing = int(np.count_nonzero(length == 0))
            one.documents += len(length)
            one.tokens += int(length.sum())
            one.repaired += int(np.count_nonzero(state == REPAIRED))
            one.skipped += bad[0]
            one.malformed += bad[1]
            one.empty += nothing - sum(bad)
            one.too_short += len(length) - nothing - int(np.count_nonzero(kept))
            one.eligible += int(length[kept].sum()) + int(np.count_nonzero(kept))
            add_to_histogram(one.before_documents, one.before_tokens, length)

    def pack(self, tokens: Tokens, keep: np.ndarray, take: np.ndarray, low: int, high: int) -> None:
        """Count documents low..high of a batch as packed: `take` (N,) tokens of each, including its separator."""
        part = slice(low, high)
        lengths, keep, take = tokens.lengths()[part] + 1, keep[part], take[part]
        for one, mask in self._by_source(tokens, part):
            packed_lengths, kept = take[mask], keep[mask]
            packed = packed_lengths > 0
            one.packed += int(packed_lengths.sum())
            one.over_budget += int(np.count_nonzero(kept & ~packed))
            one.cut += int(np.count_nonzero(packed & (packed_lengths < lengths[mask])))
            add_to_histogram(one.after_documents, one.after_tokens, packed_lengths[packed] - 1)

    def report(self, shares: Mapping[str, float], budgets: Mapping[str, int]) -> dict[str, Any]:
        """Counts with each source's share of tokens in the input, its target share, and its packed share."""
        read, packed = sum(a.tokens for a in self.sources.values()), self.packed()
        return {
            source: {
                "share_of_input": one["tokens"] / read,
                "share_requested": shares.get(source),
                "share_achieved": one["packed"] / packed,
                "budget": budgets.get(source),
                **one,
            }
            for source, one in self.to_dict().items()
        }

    def _by_source(self, tokens: Tokens, part: slice) -> Iterator[tuple[SourceStats, np.ndarray]]:
        codes = tokens.codes[part]
        for code in np.unique(codes).tolist():
            yield self.source(tokens.names[code]), codes == code


def bin_names() -> list[str]:
    """The range of each bin of the histograms, as text."""
    return ["0", "1", *(f"{2 ** (b - 1)}-{2**b - 1}" for b in range(2, BINS))]


def add_to_histogram(documents: list[int], tokens: list[int], lengths: np.ndarray) -> None:
    """Count documents and their tokens in the bins of their lengths."""
    bins = np.frexp(lengths)[1]
    for b in np.unique(bins).tolist():
        mask = bins == b
        documents[b] += int(np.count_nonzero(mask))
        tokens[b] += int(lengths[mask].sum())


def take_all(tokens: Tokens, keep: np.ndarray, low: int, room: int | None) -> np.ndarray:
    """Tokens to pack of each kept document from `low` on, at most `room` in total, int64 (N,); including separators."""
    take = np.where(keep, tokens.lengths() + 1, 0)
    take[:low] = 0
    return take if room is None else _clip(take, room)


def take_budgets(
    tokens: Tokens, keep: np.ndarray, low: int, budgets: Mapping[str, int], stats: PackingStats
) -> np.ndarray:
    """As `take_all`, with the room of each source: its budget minus its packed tokens."""
    take = take_all(tokens, keep, low, None)
    for code, name in enumerate(tokens.names):
        mask = tokens.codes == code
        take[mask] = _clip(take[mask], budgets.get(name, 0) - stats.source(name).packed)
    return take


def _clip(take: np.ndarray, room: int) -> np.ndarray:
    """Divide the room in order; the last document may get only its separator, so that the room is filled."""
    before = np.cumsum(take) - take
    return np.clip(room - before, 0, take)


class ShardBuffer:
    """Rows of one shard while they fill up."""

    def __init__(self, *, rows: int, seq_len: int) -> None:
        self.rows, self.seq_len = rows, seq_len
        self._ids = np.empty(rows * seq_len, np.int32)
        self._starts: list[int] = []
        self.used = 0

    def put(self, ids: np.ndarray, *, begins: bool) -> int:
        """Append as many tokens as fit and return how many; `begins` marks the first as a document's beginning."""
        count = min(len(ids), len(self._ids) - self.used)
        if begins and count:
            self._starts.append(self.used)
        self._ids[self.used : self.used + count] = ids[:count]
        self.used += count
        return count

    @property
    def full(self) -> bool:
        """Whether no token fits any more."""
        return self.used == len(self._ids)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Complete rows so far: ids int32 (R, S), offsets int64 (R + 1,), starts int32; see `data.packed`."""
        rows = self.used // self.seq_len
        starts = np.array([s for s in self._starts if s < rows * self.seq_len], np.int64)
        offsets = np.searchsorted(starts, np.arange(rows + 1) * self.seq_len).astype(np.int64)
        ids = self._ids[: rows * self.seq_len].reshape(rows, self.seq_len)
        return ids, offsets, (starts % self.seq_len).astype(np.int32)

    def clear(self) -> None:
        """Start the next shard."""
        self.used, self._starts = 0, []
