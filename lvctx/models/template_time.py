"""A bound for the processor time of a chat template: a template is a program from a model directory, and may never end.

transformers renders templates in Jinja's sandbox, which bounds each `range` but not loops inside loops.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 2
"""Bound of one rendering. A conversation of a million tokens takes a tenth of it."""


@contextmanager
def bounded_rendering() -> Iterator[None]:
    """Raise TimeoutError in the body when this process has computed for `SECONDS` since it began.

    In the main thread only, since Python runs handlers of signals there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGVTALRM, _raise)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it computes for more than {SECONDS} s")
