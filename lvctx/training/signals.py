"""SIGTERM and Ctrl-C during training: deferred while state changes, and raised on all ranks together."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lvctx.errors import Stopped
from lvctx.parallel.context import ParallelContext


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer SIGTERM and Ctrl-C while parameters, moments and step count are changed together."""
    with _deferred_signals():
        yield


@contextmanager
def agreed_stop(context: ParallelContext) -> Iterator[Callable[[], None]]:
    """A function that raises on every rank after any of them has received a signal.

    In a single process a signal raises immediately. With several ranks this would leave the others waiting, so the
    signal is only noted, and raised on all ranks when the function is called.
    """
    if context.size == 1:
        yield lambda: None
        return
    with _deferred_signals() as deferred:

        def raise_if_stopped() -> None:
            number = int(context.max(max(deferred, default=0)))
            if number:
                deferred.clear()
                raise Stopped if number == signal.SIGTERM else KeyboardInterrupt

        yield raise_if_stopped
        raise_if_stopped()


@contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are appended to a list instead of raised; the first remaining one is raised at the end.

    Blocking them in this thread is not sufficient: another thread takes them and Python still runs the handler here.
    """
    deferred: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield deferred  # handlers run only in the main thread
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = {s: signal.signal(s, lambda number, frame: deferred.append(number)) for s in signals}
    try:
        yield deferred
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for which in deferred[:1]:
        signal.raise_signal(which)
