"""Work in other threads: tasks whose results come one by one as they are made, and reading one item ahead."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from lvctx.inference.engine import Engine

UsedT = TypeVar("UsedT")
TaskT = TypeVar("TaskT")
FinishedT = TypeVar("FinishedT")
THREAD_NAME = "lvctx-unfinished"
"""By which the program knows threads that it does not wait for (`lvctx/__main__.py`)."""


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

    `items` and `read` run in a second thread if the engine allows it, at most one item ahead of the caller. What
    reading cost is added to the engine's meter when the item is used. The thread waits for a first `use`, which may
    load a model: transformers then changes torch's default data type, which all threads share.
    """
    if not engine.reads_ahead:
        for item in items:
            yield item, lambda item=item: use(read(item))  # type: ignore[misc]
        return
    meter = engine.meter
    wanted, stop, made = threading.Semaphore(), threading.Event(), queue.SimpleQueue[_ItemRead | BaseException | None]()

    def run() -> None:
        try:
            for item in items:
                wanted.acquire()
                if stop.is_set():
                    return
                value, error = None, None
                try:
                    value = read(item)
                except BaseException as e:  # raised where the item is used
                    error = e
                made.put(_ItemRead(item=item, value=value, error=error, spent=meter.set_aside()))
                del value, error
            made.put(None)
        except BaseException as e:
            made.put(e)

    thread = threading.Thread(target=run, daemon=True, name=THREAD_NAME)
    thread.start()
    has_used = False
    try:
        while (one := made.get()) is not None:
            if isinstance(one, BaseException):
                raise one

            def take(one: _ItemRead = one) -> UsedT:
                nonlocal has_used
                meter.restore(one.spent)
                if has_used:
                    wanted.release()
                try:
                    if one.error is not None:
                        raise one.error
                    used = use(one.value)
                finally:
                    if not has_used:
                        wanted.release()
                has_used = True
                return used

            yield one.item, take
        thread.join()
    finally:
        stop.set()
        wanted.release()
