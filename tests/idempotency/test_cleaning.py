"""Marks go while a worker runs, and a window that is too short is refused (I5)."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest
from sqlalchemy.exc import OperationalError

from reliamq.idempotency import MemoryLeaseStore, check_window, run_cleaning
from reliamq.idempotency.cleaning import CHUNK
from reliamq.spi import ConfigurationError, LeaseGrant

from .conftest import identity, until

pytestmark = pytest.mark.anyio
DAY, SHORT = timedelta(days=1), timedelta(seconds=0.01)


class Failing:
    """A store whose database is away for a while."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    async def clean(self, *, limit: int) -> int:
        del limit
        self.calls += 1
        if self.errors:
            raise self.errors.pop()
        return 0


async def test_cleaning_takes_chunk_after_chunk_until_nothing_expired_is_left() -> None:
    store, stop = MemoryLeaseStore(), anyio.Event()
    for _ in range(2 * CHUNK + 1):
        grant = await store.acquire(identity(), lease=DAY)
        assert isinstance(grant, LeaseGrant)
        await store.complete(grant, result=None, keep=timedelta(0))

    async def empty() -> bool:
        return not store._entries

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run_cleaning([store], every=DAY, stop=stop))
        await until(empty)
        stop.set()  # ends the day's wait


async def test_cleaning_outlives_a_database_that_is_away() -> None:
    store, stop = Failing(OSError("no route"), OperationalError("DELETE", {}, Exception("gone"))), anyio.Event()

    async def called_again() -> bool:
        return store.calls >= 3

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: run_cleaning([store], every=SHORT, stop=stop))
        await until(called_again)
        stop.set()


async def test_a_window_shorter_than_retries_and_replays_is_refused_with_the_least_that_will_do() -> None:
    check_window(DAY * 8, DAY, DAY * 7)
    with pytest.raises(ConfigurationError, match=r"processed_window.*at least 8 days"):
        check_window(DAY * 8 - timedelta(seconds=1), DAY, DAY * 7)
