"""Work in other threads: tasks whose results come one by one as they are made, and reading one item ahead."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from lvctx.inference.engine import Engine

UsedT = TypeVar("UsedT")
TaskT = TypeVar("TaskT")
FinishedT = TypeVar("FinishedT")
THREAD_NAME = "lvctx-unfinished"
"""Name of the threads that the program does not wait for when it ends (`lvctx/__main__.py`)."""


def interleave(
    tasks: Iterable[TaskT], work: Callable[[TaskT], Iterable[FinishedT]], *, jobs: int
) -> Generator[FinishedT, None, None]:
    """The results of all tasks, at most `jobs` at once, as they come; of one job in the order of tasks.

    An error of a task is raised here and ends the others at their next result.
    """
    if jobs == 1:
        for task in tasks:
            yield from work(task)
        return
    source, turn, stop = iter(tasks), threading.Lock(), threading.Event()
    made: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()

    def run() -> None:
        try:
            while not stop.is_set():
                with turn:
                    taken = next(((task,) for task in source), None)
                if taken is None:
                    break
                for result in work(*taken):
                    made.put(("result", result))
                    if stop.is_set():
                        break
            made.put(("end", None))
        except BaseException as e:  # raised in the thread that waits
            made.put(("error", e))

    # Daemons: a program that is stopped does not wait for a server.
    threads = [threading.Thread(target=run, daemon=True, name=THREAD_NAME) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    running = jobs
    try:
        while running:
            kind, value = made.get()
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            if kind == "end":
                running -= 1
            else:
                yield value  # type: ignore[misc]
    finally:
        stop.set()


@dataclass(frozen=True, kw_only=True)
class _ItemRead:
    item: Any
    value: Any
    error: BaseException | None
    spent: dict[str, float]


def read_ahead(
    items: Iterable[TaskT], read: Callable[[TaskT], Any], use: Callable[[Any], UsedT], engine: Engine
) -> Generator[tuple[TaskT, Callable[[], UsedT]], None, None]:
    """Each item with a function that returns `use(read(item))`, or raises what one of them raised; call it once.

    If the engine allows it, `items` and `read` run in a second thread, at most one item ahead of the caller, once an
    item was used: using the first may load a model, for which transformers changes torch's default data type for
    all threads. What reading cost is added to the engine's meter when the item is used.
    """
    source, stop, wanted = iter(items), threading.Event(), threading.Semaphore()
    made: queue.SimpleQueue[_ItemRead | BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            for item in source:
                wanted.acquire()
                if stop.is_set():
                    return
                value, error = None, None
                try:
                    value = read(item)
                except BaseException as e:  # raised where the item is used
                    error = e
                made.put(_ItemRead(item=item, value=value, error=error, spent=engine.meter.set_aside()))
                del value, error
            made.put(None)
        except BaseException as e:
            made.put(e)

    thread = threading.Thread(target=run, daemon=True, name=THREAD_NAME)

    def use_first(item: TaskT) -> UsedT:
        used = use(read(item))
        if engine.reads_ahead:
            thread.start()
        return used

    def use_read(one: _ItemRead) -> UsedT:
        engine.meter.restore(one.spent)
        wanted.release()
        if one.error is not None:
            raise one.error
        return use(one.value)

    try:
        for first in source:
            yield first, partial(use_first, first)
            if thread.ident is not None:
                break
        while thread.ident is not None and (one := made.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one.item, partial(use_read, one)
    finally:
        stop.set()
        wanted.release()
