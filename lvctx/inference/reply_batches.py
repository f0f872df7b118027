"""Replies in batches as large as the engine's, in the order of their questions."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from lvctx.errors import InputError
from lvctx.inference.engine import Engine, EngineGone, Reply

QuestionT = TypeVar("QuestionT")
Started = Any
"""What `Engine.start_reply` returned."""


def finish_in_batches(
    engine: Engine, started: Iterable[tuple[QuestionT, Started | Exception]]
) -> Iterator[tuple[QuestionT, Reply | Exception]]:
    """The reply to each started one, or its error, in order; then the engine's meter has what it cost.

    Errors that stand in place of a started reply are passed on. One that ends a batch, such as too little memory, is
    that of all its replies. Raises EngineGone.
    """
    waiting: list[tuple[QuestionT, Started | Exception, dict[str, float]]] = []
    size = 0
    for key, one in started:
        waiting.append((key, one, engine.meter.set_aside()))
        size += not isinstance(one, Exception)
        if size in (0, engine.batch):
            yield from _finish(engine, waiting)
            waiting, size = [], 0
    yield from _finish(engine, waiting)


def _finish(
    engine: Engine, waiting: list[tuple[QuestionT, Started | Exception, dict[str, float]]]
) -> Iterator[tuple[QuestionT, Reply | Exception]]:
    replies = engine.finish_replies([one for _, one, _ in waiting if not isinstance(one, Exception)])
    error: Exception | None = None
    for key, one, spent in waiting:
        engine.meter.restore(spent)
        outcome: Reply | Exception | None = one if isinstance(one, Exception) else error
        try:
            outcome = outcome or next(replies)
        except EngineGone:
            raise
        except InputError as e:
            outcome = error = e
        yield key, outcome
