"""What a sample costs: seconds of each phase, frames, tokens and memory, as the `cost` of its row."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

from lvctx.device import gpus_in_use, synchronize

FrameT = TypeVar("FrameT", covariant=True)
PEAK = "peak_memory_bytes"
Phase = Literal["decode", "encode", "prefill", "generate", "request"]
"""Reading a video; visual tokens of its frames, or their JPEG images for a server; the prompt; the reply; a server's
answer, with the requests that had to be repeated."""


class Decoding(Protocol[FrameT]):
    """Frames that are decoded while they are taken."""

    @property
    def decoded(self) -> int:
        """Frames that the decoder returned so far, those between the sampled ones included."""

    def __next__(self) -> FrameT:
        """The next sampled frame."""


class CostMeter(threading.local):
    """Adds up what one conversation costs; `take` closes a sample.

    Each thread has its own sums: what one has `set_aside`, another can `restore`.
    Phases may be nested: then only the inner one's clock runs, so that no second is counted twice.
    """

    def __init__(self, phases: Sequence[Phase] = ("decode", "encode", "prefill", "generate")) -> None:
        """Every cost has the seconds of these phases, 0 where none were spent, and of others where they were."""
        self._keys = [f"{phase}_seconds" for phase in phases] + ["frames_decoded"] * ("decode" in phases)
        self._spent: dict[str, float] = dict.fromkeys(self._keys, 0)
        self._phase: Phase | None = None
        self._since = 0.0

    @contextmanager
    def phase(self, phase: Phase | None) -> Iterator[None]:
        """Count the time until its end; None: as no sample's, such as that of loading a model.

        It ends when the GPUs have computed what it queued. Decoding and requests queue nothing.
        """
        outer = self._enter(phase)
        try:
            yield
        finally:
            if phase in ("encode", "prefill", "generate"):
                synchronize()
            self._enter(outer)

    def _enter(self, phase: Phase | None) -> Phase | None:
        now = time.perf_counter()
        if self._phase is not None:
            self.add(**{f"{self._phase}_seconds": now - self._since})
        outer, self._phase, self._since = self._phase, phase, now
        return outer

    def decoding(self, frames: Decoding[FrameT]) -> Iterator[FrameT]:
        """The frames; waiting for them is decoding."""
        try:
            while True:
                with self.phase("decode"):
                    try:
                        frame = next(frames)
                    except StopIteration:
                        return
                yield frame
        finally:
            self.add(frames_decoded=frames.decoded)

    def add(self, **amounts: float) -> None:
        """Add to what the current sample costs."""
        for key, amount in amounts.items():
            self._spent[key] = self._spent.get(key, 0) + amount

    def set_aside(self) -> dict[str, float]:
        """What this thread spent since the last sample, which the current sample then does not pay for."""
        spent, self._spent = self._spent, dict.fromkeys(self._keys, 0)
        return spent

    def restore(self, spent: Mapping[str, float]) -> None:
        """Make the current sample pay for what was set aside."""
        self.add(**{key: amount for key, amount in spent.items() if key != PEAK})
        if PEAK in spent:
            self._spent[PEAK] = max(spent[PEAK], self._spent.get(PEAK, 0))

    def take(self) -> dict[str, Any]:
        """The field of a row, `{"cost": {...}}`, with what was spent since the last call; empty if nothing is measured.

        `peak_memory_bytes` is summed over the GPUs that this process uses, and missing where it uses none.
        """
        spent = self.set_aside()
        if gpus := gpus_in_use():
            import torch

            allocated = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
            spent[PEAK] = max(spent.pop(PEAK, 0), allocated)
            for gpu in gpus:
                torch.cuda.reset_peak_memory_stats(gpu)
        cost = {key: round(value, 6) if key.endswith("_seconds") else value for key, value in spent.items()}
        return {"cost": cost} if cost else {}
