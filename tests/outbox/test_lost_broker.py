"""A broker loses what it confirmed; after a replay every effect has happened exactly once (O7)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from reliamq import ConfigurationError, Reliamq, outbox
from reliamq.handlers import Backoff
from reliamq.settings import OutboxSettings, RelaySettings, Settings, WorkerSettings

from .conftest import Order, until

pytestmark = pytest.mark.anyio
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ORDERS = 60


def make_app(folder: Path, database: str, *, keep: timedelta = DAY, effects: bool = True) -> Reliamq:
    """An application whose handler writes down each order that it applies."""
    settings = Settings(
        broker=f"embedded:///{folder}/broker.db",
        database=database,
        outbox=OutboxSettings(keep=keep),
        worker=WorkerSettings(lease=timedelta(seconds=2)),
        relay=RelaySettings(poll=timedelta(milliseconds=10)),
    )
    app = Reliamq(settings)
    orders = app.topic("orders", Order, key=lambda order: order.account)

    async def apply(order: Order, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": order.number})

    async def note(order: Order) -> None:
        del order

    if effects:
        app.handler(orders, group="accounts", effects="transaction", concurrency=8)(apply)
    else:
        app.handler(orders, group="accounts", effects="repeatable")(note)
    return app


@asynccontextmanager
async def running(*functions: Callable[[anyio.Event], Awaitable[None]]) -> AsyncIterator[None]:
    """Relays and workers run inside the block and finish at its end."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for function in functions:
            tasks.start_soon(function, stop)
        try:
            yield
        finally:
            stop.set()


async def place(app: Reliamq, engine: AsyncEngine, first: int, last: int) -> None:
    """Orders of three accounts, each in a transaction of its own."""
    for number in range(first, last):
        async with AsyncSession(engine) as session, session.begin():
            outbox.add(session, app.topics["orders"], Order(account="abc"[number % 3], number=number))


async def effects(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return sorted(await connection.scalars(text("SELECT number FROM effect")))


@pytest.fixture
async def ledger(engine: AsyncEngine) -> AsyncEngine:
    """The database with a table that takes an effect twice, so that it can be seen."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER)"))
    return engine


async def test_a_replay_brings_every_effect_to_exactly_one(ledger: AsyncEngine, database: str, tmp_path: Path) -> None:
    """A third is applied and a third waits at the broker when all that it has is lost; a third comes after that."""

    async def applied(least: int) -> bool:
        return len(await effects(ledger)) >= least

    async def nothing_waits() -> bool:
        async with app.outbox_store() as store:
            return (await store.status()).waiting == 0

    app = make_app(tmp_path, database)
    async with app:
        await place(app, ledger, 0, ORDERS // 3)
        async with running(app.run_relay, app.run_worker):
            await until(lambda: applied(ORDERS // 3))
        await place(app, ledger, ORDERS // 3, 2 * ORDERS // 3)
        async with running(app.run_relay):
            await until(nothing_waits)
    for file in tmp_path.glob("broker.db*"):
        file.unlink()

    app = make_app(tmp_path, database)
    async with app, app.outbox_store() as store:
        await place(app, ledger, 2 * ORDERS // 3, ORDERS)
        async with running(app.run_relay, app.run_worker):
            await until(lambda: applied(2 * ORDERS // 3))
            assert await effects(ledger) == [*range(ORDERS // 3), *range(2 * ORDERS // 3, ORDERS)]  # a third is lost
            assert await store.replay(since=HOUR) >= 2 * ORDERS // 3
            await until(lambda: applied(ORDERS))
            await until(nothing_waits)
            await store.replay(since=HOUR)  # once more than needed
            await until(nothing_waits)
            await anyio.sleep(0.5)  # what comes twice would come now

    assert await effects(ledger) == list(range(ORDERS))


async def test_an_application_whose_processed_ids_go_before_its_kept_rows_is_refused(
    database: str, tmp_path: Path
) -> None:
    """I5: a row that is sent again after its id was forgotten would take effect twice."""
    longest = Backoff().longest()
    fine = DAY * 7 - longest  # 14 days of processed ids, 7 of which for dead letters
    refused = make_app(tmp_path, database, keep=fine + timedelta(seconds=1))

    with pytest.raises(
        ConfigurationError, match=r"worker\.processed_window is 14 days.*outbox\.keep.*at least 14 days"
    ):
        async with refused:
            pass

    for app in (make_app(tmp_path, database, keep=fine), make_app(tmp_path, database, keep=30 * DAY, effects=False)):
        async with app:
            pass
