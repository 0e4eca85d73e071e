"""A relay in the process of the application sends what has committed at once, and not when its poll comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from reliamq import outbox
from reliamq.outbox import Relay, SqlOutboxStore
from reliamq.outbox.waking import Bell, ringing

from .conftest import Order, Recorder, orders, until

pytestmark = pytest.mark.anyio
SOON = 5.0


@asynccontextmanager
async def sleepy(store: SqlOutboxStore, recorder: Recorder) -> AsyncIterator[None]:
    """A relay that looks at its table once an hour."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Relay(store, recorder, poll=timedelta(hours=1)).run, stop)
        await anyio.sleep(0.2)  # until it sleeps
        yield
        stop.set()


async def is_sent(recorder: Recorder, *numbers: int) -> None:
    async def all_are() -> bool:
        return recorder.numbers("a") == list(numbers)

    await until(all_are, seconds=SOON)


async def test_a_commit_of_a_session_wakes_the_relay(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    recorder = Recorder()
    async with sleepy(store, recorder):
        for number in range(3):
            async with AsyncSession(engine) as session, session.begin():
                outbox.add(session, orders, Order(account="a", number=number))
            await is_sent(recorder, *range(number + 1))


async def test_a_commit_in_another_thread_wakes_the_relay(engine: AsyncEngine, sync_engine: Engine) -> None:
    def commit() -> None:
        with Session(sync_engine) as session, session.begin():
            outbox.add(session, orders, Order(account="a", number=1))

    recorder = Recorder()
    async with sleepy(SqlOutboxStore(engine), recorder):
        await anyio.to_thread.run_sync(commit)
        await is_sent(recorder, 1)


async def test_what_is_committed_by_a_plain_connection_is_sent_at_once_when_it_says_so(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    recorder = Recorder()
    async with sleepy(store, recorder):
        async with AsyncSession(engine) as session, session.begin():
            outbox.add(session, orders, Order(account="a", number=1))
            session.info.clear()  # as if nobody told
        outbox.wake_relays()
        await is_sent(recorder, 1)


async def test_a_session_that_adds_nothing_wakes_nobody(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rung = []
    monkeypatch.setattr(Bell, "ring", lambda bell: rung.append(bell))
    with ringing():
        async with AsyncSession(engine) as session:
            outbox.add(session, orders, Order(account="a", number=1))
            await session.commit()
            assert len(rung) == 1
            await session.commit()

    assert len(rung) == 1


async def test_a_savepoint_wakes_nobody_and_its_transaction_does(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rung = []
    monkeypatch.setattr(Bell, "ring", lambda bell: rung.append(bell))
    with ringing():
        async with AsyncSession(engine) as session:
            async with session.begin_nested():
                outbox.add(session, orders, Order(account="a", number=1))
            assert rung == []
            await session.commit()

    assert len(rung) == 1


async def test_a_relay_that_is_cancelled_leaves_nothing_running(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    before = asyncio.all_tasks()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Relay(store, Recorder()).run, anyio.Event())
        await anyio.sleep(0.1)
        tasks.cancel_scope.cancel()

    assert asyncio.all_tasks() <= before


async def test_a_relay_that_sleeps_stops_at_once(store: SqlOutboxStore) -> None:
    began = time.monotonic()
    async with sleepy(store, Recorder()):
        pass

    assert time.monotonic() - began < SOON
