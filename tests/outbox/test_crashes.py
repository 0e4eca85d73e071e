"""A relay's process that dies or stands still at the worst moments loses nothing and disturbs nobody (O3, O4)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.abc
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.backends import open_backend
from reliamq.outbox import SqlOutboxStore
from reliamq.spi import Backend, Durability, GroupSpec, TopicSpec

from .conftest import Order, Recorder, add, drain, firsts, until

pytestmark = pytest.mark.anyio
LEASE, KEEP = timedelta(seconds=30), timedelta(hours=1)
SHORT_LEASE_SECONDS = 1.0


@pytest.fixture
async def backend(tmp_path: Path) -> Backend:
    backend = open_backend(f"embedded:///{tmp_path}/broker.db")
    async with backend.storage() as storage:
        spec = TopicSpec("orders", (GroupSpec("g"),), durability=Durability.DEVELOPMENT)
        assert await storage.declare([spec]) == []
    return backend


@asynccontextmanager
async def relay_process(
    database: str, backend: Backend, stage: str, keep: timedelta = timedelta(0)
) -> AsyncIterator[anyio.abc.Process]:
    """A relay that has come to ``stage`` and waits there; killed at the end.  keep: how long it keeps sent rows."""
    command = [sys.executable, "-m", "tests.outbox.relay_process", database, backend.url, stage]
    command += [str(SHORT_LEASE_SECONDS), str(keep.total_seconds())]
    async with await anyio.open_process(
        command, stdin=subprocess.PIPE, stderr=None, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            await _line(process, stage)
            yield process
        finally:
            if process.returncode is None:
                process.kill()


async def _line(process: anyio.abc.Process, expected: str) -> None:
    assert process.stdout is not None
    with anyio.fail_after(30):
        assert (await process.stdout.receive()).decode().split()[0] == expected


async def arrived(backend: Backend) -> list[tuple[str, str, int]]:
    """What is on the broker: (id, account, number), in order."""
    async with backend.subscription("orders", "g", lease=LEASE) as subscription:
        found = await subscription.receive(1_000, max_bytes=1 << 24, wait=timedelta(seconds=5))
        decoded = [(one.message.id, Order.model_validate_json(one.message.body)) for one in found]
    return [(message_id, order.account, order.number) for message_id, order in decoded]


@pytest.mark.parametrize("stage", ["claimed", "sent", "settled"])
async def test_a_killed_relays_rows_are_sent_by_the_next_with_the_same_ids_and_in_order(
    engine: AsyncEngine, store: SqlOutboxStore, database: str, backend: Backend, stage: str
) -> None:
    added = await add(engine, *(("abc"[number % 3], number) for number in range(30)))
    async with relay_process(database, backend, stage) as process:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL

    async with backend.publisher() as publisher:
        with anyio.fail_after(20):  # the dead one's lease is a second
            await drain(store, publisher)

    found = await arrived(backend)
    assert {message_id for message_id, _, _ in found} == set(added)
    for offset, account in enumerate("abc"):
        assert firsts([number for _, of, number in found if of == account]) == list(range(offset, 30, 3))


@pytest.mark.parametrize("stage", ["claimed", "sent", "settled"])
async def test_a_relay_killed_on_replayed_rows_loses_none_of_them(
    engine: AsyncEngine, keeping: SqlOutboxStore, database: str, backend: Backend, stage: str
) -> None:
    """O4, O7"""
    added = await add(engine, *(("abc"[number % 3], number) for number in range(30)))
    await drain(keeping, Recorder())  # to a broker that has lost everything since
    assert await keeping.replay(since=KEEP) == 30
    async with relay_process(database, backend, stage, KEEP) as process:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL

    async with backend.publisher() as publisher:
        with anyio.fail_after(20):
            await drain(keeping, publisher)

    found = await arrived(backend)
    assert {message_id for message_id, _, _ in found} == set(added)
    for offset, account in enumerate("abc"):
        assert firsts([number for _, of, number in found if of == account]) == list(range(offset, 30, 3))
    assert (await keeping.status()).kept == 30


async def test_a_replay_that_is_killed_has_changed_nothing_and_can_be_repeated(
    engine: AsyncEngine, keeping: SqlOutboxStore, database: str, backend: Backend
) -> None:
    """O7"""
    added = await add(engine, *(("abc"[number % 3], number) for number in range(30)))
    await drain(keeping, Recorder())
    async with relay_process(database, backend, "replaying", KEEP) as process:
        process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL

    status = await keeping.status()
    assert (status.waiting, status.kept) == (0, 30)
    with anyio.fail_after(20):  # the dead one's locks are gone
        assert await keeping.replay(since=KEEP) == 30
    again = Recorder()
    await drain(keeping, again)
    assert {one.id for one in again.stored} == set(added)


async def test_a_relay_that_stood_still_after_its_claim_sends_nothing_of_it(
    engine: AsyncEngine, store: SqlOutboxStore, database: str, backend: Backend
) -> None:
    await add(engine, *(("a", number) for number in range(5)))
    recorder = Recorder()
    async with relay_process(database, backend, "claimed") as process:
        os.kill(process.pid, signal.SIGSTOP)
        await drain(store, recorder)  # after the lease, another one takes over
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdin is not None
        await process.stdin.send(b"\n")
        await add(engine, ("b", 7))  # its next claim says that it is through with the old one
        await _line(process, "claimed")

    assert recorder.numbers("a") == [0, 1, 2, 3, 4]
    async with backend.subscription("orders", "g", lease=LEASE) as subscription:
        assert not await subscription.receive(10, max_bytes=1 << 20, wait=timedelta(0))


async def test_a_relay_that_stood_still_after_sending_takes_no_row_and_no_claim_from_its_heir(
    engine: AsyncEngine, store: SqlOutboxStore, database: str, backend: Backend
) -> None:
    await add(engine, *(("a", number) for number in range(5)))
    heirs: list[int] = []
    async with relay_process(database, backend, "sent") as process:
        os.kill(process.pid, signal.SIGSTOP)
        await until(lambda: _claims(store, heirs))
        await add(engine, ("a", 5))
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdin is not None
        await process.stdin.send(b"\n")
        await until(lambda: _waits(store, 1))  # its confirms are true, so its rows go

        assert heirs == [0, 1, 2, 3, 4]
        assert await store.claim("third", limit=10, lease=LEASE) == []  # row 5 is the heir's key still

    assert [number for _, _, number in await arrived(backend)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("database", ["psycopg", "asyncpg"], indirect=True)
@pytest.mark.parametrize("stage", ["leasing", "settling"])
async def test_a_relay_that_stands_still_in_a_transaction_does_not_keep_its_locks_from_others(
    engine: AsyncEngine, store: SqlOutboxStore, database: str, backend: Backend, stage: str
) -> None:
    await add(engine, *(("a", number) for number in range(5)))
    recorder = Recorder()
    async with relay_process(database, backend, stage) as process:
        os.kill(process.pid, signal.SIGSTOP)
        await drain(store, recorder)  # its session is ended by the server, and its lease by time
        os.kill(process.pid, signal.SIGCONT)
        assert process.stdin is not None
        await process.stdin.send(b"\n")
        await add(engine, ("b", 7))
        await _line(process, stage)  # it goes on, with a new session

    assert firsts(recorder.numbers("a")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("database", ["psycopg"], indirect=True)
async def test_a_process_that_stands_still_in_a_replay_keeps_no_relay_from_settling(
    engine: AsyncEngine, keeping: SqlOutboxStore, database: str, backend: Backend
) -> None:
    await add(engine, ("a", 1))
    await drain(keeping, Recorder())
    async with relay_process(database, backend, "replaying", KEEP) as process:
        os.kill(process.pid, signal.SIGSTOP)
        await add(engine, ("a", 2))
        await drain(keeping, recorder := Recorder())

    assert recorder.numbers("a") == [2]  # the server took back what was replayed


@pytest.mark.parametrize("database", ["psycopg"], indirect=True)
async def test_a_relay_that_stands_still_while_it_removes_old_rows_keeps_no_other_from_sending(
    engine: AsyncEngine, keeping: SqlOutboxStore, database: str, backend: Backend
) -> None:
    await add(engine, ("a", 1))
    await drain(keeping, Recorder())
    short = timedelta(milliseconds=1)
    async with relay_process(database, backend, "cleaning", short) as process:
        os.kill(process.pid, signal.SIGSTOP)
        await add(engine, ("a", 2))
        await drain(SqlOutboxStore(engine, keep=short), recorder := Recorder())

    assert recorder.numbers("a") == [2]


async def _claims(store: SqlOutboxStore, into: list[int]) -> bool:
    rows = await store.claim("heir", limit=10, lease=LEASE)
    into.extend(Order.model_validate_json(one.message.body).number for one in rows)
    return bool(rows)


async def _waits(store: SqlOutboxStore, expected: int) -> bool:
    return (await store.status()).waiting == expected
