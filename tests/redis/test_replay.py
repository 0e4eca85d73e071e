"""Where fewer replicas are asked for than exist, a failover may forget a confirmed message: the audit says so before
it, the worker when it happens, and a replay of the kept rows brings every effect to exactly one (O7, P1, I2).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from reliamq import Durability, Reliamq, outbox
from reliamq.database import open_engine
from reliamq.settings import OutboxSettings, RelaySettings, Settings, WorkerSettings
from reliamq.spi import Severity
from tests.brokers.application import Order
from tests.redis.test_sentinel_and_cluster import is_primary, until, watched
from tests.servers.process import ServerProcess
from tests.servers.redis import PASSWORD, RedisServers

# Slow: a failover takes seconds that a busy machine stretches
pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(180)]
ORDERS = 30
ACCOUNTS = 5


class Shop:
    """An application whose effects are rows.  limit: orders from this number on are not applied yet."""

    def __init__(self, servers: RedisServers, database: str) -> None:
        self.limit = ORDERS
        self.app = Reliamq(
            Settings(
                broker=servers.sentinel_url,
                database=database,
                outbox=OutboxSettings(keep=timedelta(days=1)),
                worker=WorkerSettings(lease=timedelta(seconds=5)),
                relay=RelaySettings(poll=timedelta(milliseconds=20)),
                backends={"redis": {"lanes": 2, "replicas": 0}},
            )
        )
        self.orders = self.app.topic(
            f"test-{uuid.uuid4()}", Order, key=lambda order: order.account, durability=Durability.FSYNCED
        )
        self.app.handler(self.orders, group="g", effects="transaction", concurrency=20)(self._apply)

    async def _apply(self, order: Order, session: AsyncSession) -> None:
        while order.number >= self.limit:
            await anyio.sleep(0.05)
        await session.execute(text("INSERT INTO effects (number) VALUES (:number)"), {"number": order.number})

    async def place(self, engine: AsyncEngine, numbers: range) -> None:
        """Each in a transaction of its own; waits until the broker has confirmed all."""
        for number in numbers:
            async with AsyncSession(engine) as session, session.begin():
                outbox.add(session, self.orders, Order(number=number, account=f"account {number % ACCOUNTS}"))
        await self.sent()

    async def sent(self) -> None:
        async with self.app.outbox_store() as store:
            with anyio.fail_after(60):
                while (await store.status()).waiting:
                    await anyio.sleep(0.05)


async def effects(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return sorted(await connection.scalars(text("SELECT number FROM effects")))


async def applied(engine: AsyncEngine, count: int) -> None:
    with anyio.fail_after(60):
        while len(await effects(engine)) < count:
            await anyio.sleep(0.05)


@contextmanager
def cut_off(servers: RedisServers, primary: ServerProcess, replica: ServerProcess) -> Iterator[None]:
    """The replica gets nothing more; whatever it becomes, it can follow again afterwards."""
    with servers.client(replica) as client:
        client.config_set("masterauth", "wrong")
    with servers.client(primary) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "REPLICA")
    try:
        yield
    finally:
        with servers.client(replica) as client:
            client.config_set("masterauth", PASSWORD)
            client.config_rewrite()  # as the Sentinels had it do with what was set before


async def test_a_failover_that_forgot_confirmed_messages_is_told_and_a_replay_brings_every_effect_to_exactly_one(
    whole: RedisServers, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A third is applied and everywhere, a third is applied, a third waits; the last two the new primary never had."""
    shop = Shop(whole, postgresql_url)
    stop = anyio.Event()
    async with shop.app, open_engine(postgresql_url) as engine, anyio.create_task_group() as tasks:
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE effects (number INTEGER)"))
        findings = await shop.app.audit()
        assert any(one.setting == "failover" and one.severity is Severity.RISKS for one in findings), findings

        tasks.start_soon(shop.app.run_worker, stop)
        tasks.start_soon(shop.app.run_relay, stop)
        await shop.place(engine, range(ORDERS // 3))
        await applied(engine, ORDERS // 3)
        shop.limit = 2 * ORDERS // 3
        old, new = watched(whole)
        with cut_off(whole, old, new):
            await shop.place(engine, range(ORDERS // 3, ORDERS))
            await applied(engine, 2 * ORDERS // 3)
            await anyio.sleep(0.5)
            await anyio.to_thread.run_sync(old.kill)
            await until(lambda: is_primary(whole, new))
        await anyio.to_thread.run_sync(whole.start)
        shop.limit = ORDERS
        await until(lambda: any(is_told(one) for one in caplog.records))

        await anyio.sleep(1)
        assert len(await effects(engine)) < ORDERS, "something was lost"
        async with shop.app.outbox_store() as store:
            assert await store.replay(since=timedelta(hours=1)) == ORDERS
        await shop.sent()
        await applied(engine, ORDERS)
        await anyio.sleep(1)  # what comes twice would come now
        assert await effects(engine) == list(range(ORDERS))
        stop.set()


def is_told(record: logging.LogRecord) -> bool:
    return record.levelno == logging.ERROR and "replay the outbox" in record.getMessage()
