"""What a claim costs does not grow with what waits (O6), also while rows wait for their retry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.database import now_seconds
from reliamq.outbox import OutboxMessage, SqlOutboxStore
from reliamq.outbox.table import columns_of
from tests.databases import MARIADB

from .conftest import Order, orders

pytestmark = pytest.mark.anyio
FEW, MANY, KEYS = 3_000, 30_000, 300
COUNTERS = {
    "postgresql": """SELECT (SELECT sum(seq_tup_read) FROM pg_stat_user_tables)
        + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes)""",
    "mysql": """SELECT sum(variable_value) FROM information_schema.global_status
        WHERE variable_name LIKE 'handler\\_read\\_%' AND variable_name NOT LIKE '%\\_rnd%'""",
}


@pytest.mark.parametrize("database", ["psycopg", MARIADB], indirect=True)
@pytest.mark.parametrize("retrying", [0, 1], ids=["nothing-retried", "one-retried"])
async def test_a_claim_reads_no_more_of_a_large_table_than_of_a_small_one(engine: AsyncEngine, retrying: int) -> None:
    await _fill(engine, FEW, retrying)
    of_few = await rows_read_by_a_claim(engine)
    await _fill(engine, MANY, 0)
    of_many = await rows_read_by_a_claim(engine)

    assert of_many < 2 * of_few + 2_000


@pytest.mark.parametrize("database", ["psycopg", "asyncpg"], indirect=True)
@pytest.mark.parametrize("statistics", ["of-few", "of-none", "of-none-while-it-is-filled"])
async def test_what_was_planned_for_a_small_table_does_not_read_a_large_one(
    engine: AsyncEngine, statistics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver prepares what it executes often, and the database plans it once: when nearly nothing was there.

    Each claim of an idle relay looks whether there is anything, and where rows begin.
    """
    monkeypatch.setattr("reliamq.outbox.claims.floors.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("reliamq.outbox.claims.floors.WHOLE_SECONDS", 0.0)
    store = SqlOutboxStore(engine)

    async def claim() -> int:
        rows = await store.claim("one", limit=500, lease=timedelta(seconds=30))
        await store.settle("one", confirmed=rows, rejected=[])
        return len(rows)

    for _ in range(20):
        await _fill(engine, 3, 0)
        while await claim():
            pass
        if statistics == "of-none":
            await _in_autocommit(engine, f"VACUUM ANALYZE {OutboxMessage.__tablename__}")
    async with _filling(engine, MANY, 0):
        if statistics == "of-none-while-it-is-filled":
            await _analyse(engine)

    before = await rows_read(engine)
    assert await claim() == 500
    assert await rows_read(engine) - before < MANY // 2


async def _fill(engine: AsyncEngine, rows: int, retrying: int) -> None:
    async with _filling(engine, rows, retrying):
        pass
    await _analyse(engine)


@asynccontextmanager
async def _filling(engine: AsyncEngine, rows: int, retrying: int) -> AsyncIterator[None]:
    """They are written, and seen when the block is left."""
    messages = [orders.message(Order(account=f"a-{number % KEYS}", number=number)) for number in range(rows)]
    async with engine.begin() as connection:
        await connection.execute(insert(OutboxMessage), [columns_of(message) for message in messages])
        late = update(OutboxMessage).where(OutboxMessage.message_id == messages[0].id)
        if retrying:
            await connection.execute(late.values(available_at=now_seconds() + 3_600))
        yield


async def _analyse(engine: AsyncEngine) -> None:
    table = OutboxMessage.__tablename__
    await _in_autocommit(engine, f"ANALYZE {table}" if _is_postgresql(engine) else f"ANALYZE TABLE {table}")


async def _in_autocommit(engine: AsyncEngine, statement: str) -> None:
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text(statement))


async def rows_read_by_a_claim(engine: AsyncEngine) -> int:
    store = SqlOutboxStore(engine)
    before = await rows_read(engine)
    rows = await store.claim("one", limit=500, lease=timedelta(seconds=30))
    read = await rows_read(engine) - before
    assert len(rows) == 500
    await store.settle("one", confirmed=[], rejected=[])
    return read


async def rows_read(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        if _is_postgresql(engine):
            await _have_all_told(connection)
        return int(await connection.scalar(text(COUNTERS[engine.dialect.name])) or 0)


async def _have_all_told(connection: AsyncConnection) -> None:
    """Backends tell what they have read when they are idle, and at most once a second."""
    await anyio.sleep(1.2)
    await connection.execute(text("SELECT pg_stat_force_next_flush()"))
    await connection.commit()


def _is_postgresql(engine: AsyncEngine) -> bool:
    return engine.dialect.name == "postgresql"
