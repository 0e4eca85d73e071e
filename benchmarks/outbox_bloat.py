"""What becomes of the outbox's table under a steady load on PostgreSQL, by how often autovacuum comes.

    python -m benchmarks.outbox_bloat [SECONDS]

2,000 rows a second are added and relayed, each confirmed at once, for so many seconds: with PostgreSQL's own settings,
with those that docs/departure.md advises, and with those beside a snapshot that somebody holds all the while.  Printed:
the size of the table with its indexes and what a claim takes, at the end, and how often autovacuum came.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import timedelta

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from tests.servers.postgresql import run_postgresql

from benchmarks.kept_rows import fill
from reliamq import outbox
from reliamq.database import open_engine
from reliamq.outbox import SqlOutboxStore

RATE, BATCH, SECONDS = 2_000, 500, 180
LEASE = timedelta(seconds=30)
ADVICE = """ALTER TABLE {table} SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000, autovacuum_vacuum_cost_delay = 0)"""
SIZE = "SELECT pg_total_relation_size('reliamq_outbox') >> 20"
VISITS = "SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'reliamq_outbox'"


async def add_steadily(engine: AsyncEngine, until: float) -> None:
    began, added = time.monotonic(), 0
    while time.monotonic() < until:
        await fill(engine, BATCH)
        added += BATCH
        await asyncio.sleep(max(0.0, began + added / RATE - time.monotonic()))


async def relay_steadily(engine: AsyncEngine, until: float) -> list[float]:
    """What each claim took, in milliseconds."""
    store, claims = SqlOutboxStore(engine), list[float]()
    while time.monotonic() < until:
        began = time.perf_counter()
        rows = await store.claim("benchmark", limit=BATCH, lease=LEASE)
        claims.append((time.perf_counter() - began) * 1000)
        if rows:
            await store.settle("benchmark", confirmed=rows, rejected=[])
        else:
            await asyncio.sleep(0.05)
    return claims


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[None]:
    """A transaction that has seen something, and stays open."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        await connection.execute(text("SELECT pg_current_xact_id()"))
        yield


async def steady(name: str, url: str, seconds: float, statements: Sequence[str], *, held: bool = False) -> None:
    async with open_engine(url) as engine, AsyncExitStack() as stack:
        await outbox.create_tables_async(engine)
        async with engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement))
        if held:
            await stack.enter_async_context(snapshot(engine))
        until = time.monotonic() + seconds
        _, claims = await asyncio.gather(add_steadily(engine, until), relay_steadily(engine, until))
        async with engine.connect() as connection:
            size, visits = await connection.scalar(text(SIZE)), await connection.scalar(text(VISITS))
    last = statistics.median(claims[-len(claims) // 10 :])
    print(f"{name:<30} {size:5} MiB   claim {last:6.1f} ms   autovacuum came {visits} times")


async def main(urls: Sequence[str], seconds: float) -> None:
    advice = [ADVICE.format(table=table) for table in ("reliamq_outbox", "reliamq_outbox_lease")]
    await steady("PostgreSQL's own settings", urls[0], seconds, [])
    await steady("as advised", urls[1], seconds, advice)
    await steady("as advised, a snapshot held", urls[2], seconds, advice, held=True)


if __name__ == "__main__":
    with ExitStack() as stack:
        server = stack.enter_context(run_postgresql(fsync="on"))
        databases = [stack.enter_context(server.fresh_database()) for _ in range(3)]
        anyio.run(main, databases, float((*sys.argv[1:], SECONDS)[0]))
