"""Optimistic locking: a transaction that lost a race is run again at once (I4).

What counts is SQLAlchemy's version counter (``StaleDataError``) and what databases say themselves: serialization
failures, deadlocks, a busy SQLite.  Anything else is a failure of the effect and not retried here.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from sqlalchemy.orm.exc import StaleDataError

from reliamq.database import is_retriable

__all__ = ["ATTEMPTS", "is_conflict", "pause_seconds", "retry_on_conflict"]

T = TypeVar("T")
ATTEMPTS = 10


def is_conflict(error: BaseException) -> bool:
    """Whether ``error`` says only that somebody else was faster."""
    return isinstance(error, StaleDataError) or is_retriable(error)


def pause_seconds(attempt: int) -> float:
    """A little chance before the ``attempt``-th repetition, so that two do not collide again and again."""
    return random.uniform(0, 0.005 * min(2**attempt, 32))  # noqa: S311  # spreads load, no secret


async def retry_on_conflict(transaction: Callable[[], Awaitable[T]], *, attempts: int = ATTEMPTS) -> T:
    """Run a function that is one whole transaction, again while it ends in a conflict.

    attempts: how often at most; then the last conflict is raised.  Cancelled: as the transaction leaves it.
    """
    for attempt in range(1, attempts):
        try:
            return await transaction()
        except Exception as error:
            if not is_conflict(error):
                raise
        await anyio.sleep(pause_seconds(attempt))
    return await transaction()
