"""Tasks in several threads, whose results come one by one as they are made."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

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
