"""What keeping sent rows costs: claims and settlements without it, with none kept yet, and beside many kept rows.

    python -m benchmarks.kept_rows DATABASE [KEPT]

DATABASE: the URL of an empty database, such as sqlite:////tmp/kept.db.  Claims and settlements of 500 rows each, of
about 250 bytes and 1,000 keys, confirmed at once.  The three are measured in turn, a batch each, so that what else the
machine does befalls all of them; each has its tables to itself, through which KEPT rows have gone before.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TypeVar

import anyio
from pydantic import BaseModel
from sqlalchemy import insert, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq import outbox
from reliamq.database import open_engine
from reliamq.outbox import OutboxMessage, SqlOutboxStore
from reliamq.outbox.table import columns_of
from reliamq.topics import Topic

T = TypeVar("T")
LEASE, DAY = timedelta(minutes=10), timedelta(days=1)
BATCH, ROUNDS = 500, 100
TEXT = "x" * 150


class Order(BaseModel):
    number: int
    account: str
    amount: int
    text: str


orders = Topic("orders", Order, key=lambda order: order.account)


async def fill(engine: AsyncEngine, rows: int) -> None:
    """Add so many rows that wait."""
    for start in range(0, rows, 5_000):
        numbers = range(start, min(start + 5_000, rows))
        messages = [orders.message(Order(number=n, account=f"a-{n % 1000}", amount=n % 97, text=TEXT)) for n in numbers]
        async with engine.begin() as connection:
            await connection.execute(insert(OutboxMessage), [columns_of(message) for message in messages])


async def timed(work: Awaitable[T], into: list[float]) -> T:
    began = time.perf_counter()
    result = await work
    into.append((time.perf_counter() - began) * 1000)
    return result


async def one_batch(store: SqlOutboxStore, claims: list[float], settlements: list[float]) -> int:
    rows = await timed(store.claim("benchmark", limit=BATCH, lease=LEASE), claims)
    await timed(store.settle("benchmark", confirmed=rows, rejected=[]), settlements)
    return len(rows)


async def drain(store: SqlOutboxStore) -> None:
    while await one_batch(store, [], []):
        pass


async def tidy(engine: AsyncEngine) -> None:
    """What autovacuum does sooner or later."""
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE"))


@asynccontextmanager
async def tables(url: str, name: str) -> AsyncIterator[AsyncEngine]:
    """An engine whose tables nobody else has: a schema of PostgreSQL, a file of SQLite."""
    if url.startswith("sqlite"):
        async with open_engine(f"{url}.{name}") as engine:
            yield engine
        return
    inside = make_url(url).update_query_dict({"options": f"-csearch_path={name}"})
    async with open_engine(inside.render_as_string(hide_password=False)) as engine:
        async with engine.begin() as connection:
            await connection.execute(text(f"CREATE SCHEMA {name}"))
        yield engine


def line(name: str, claims: Sequence[float], settlements: Sequence[float]) -> None:
    def spread(values: Sequence[float]) -> str:
        low, middle, high = statistics.quantiles(values, n=4)
        return f"{middle:6.1f} ms ({low:.1f} to {high:.1f})"

    print(f"{name:<22} claim {spread(claims)}   settle {spread(settlements)}")


async def main(url: str, kept: int = 200_000) -> None:
    async with tables(url, "without") as one, tables(url, "none_kept") as two, tables(url, "many_kept") as three:
        stores = {
            "without keeping": (one, SqlOutboxStore(one)),
            "keeping, none kept": (two, SqlOutboxStore(two, keep=DAY)),
            f"keeping, {kept} kept": (three, SqlOutboxStore(three, keep=DAY)),
        }
        for engine in (one, two, three):
            await outbox.create_tables_async(engine, keep=engine is not one)
        full = stores[f"keeping, {kept} kept"][1]
        for engine in (one, two, three):
            await fill(engine, kept)
            await drain(full if engine is three else SqlOutboxStore(engine))
            await fill(engine, BATCH * (ROUNDS + 20))
            await tidy(engine)

        readings: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in stores}
        turns = list(stores.items())
        for _ in range(ROUNDS):
            random.shuffle(turns)
            for name, (_, store) in turns:
                await one_batch(store, *readings[name])
        for name, (claims, settlements) in readings.items():
            line(name, claims, settlements)
        await drain(full)
        await _look_after(full)


async def _look_after(store: SqlOutboxStore) -> None:
    took: list[float] = []
    status = await timed(store.status(), took)
    print(f"status beside {status.kept} kept rows: {took.pop():.0f} ms")
    found = await timed(store.kept(since=DAY), took)
    print(f"kept: {took.pop():.0f} ms, {found.rows} rows")
    replayed = await timed(store.replay(since=DAY), took)
    print(f"replay of {replayed} rows: {took.pop() / 1000:.1f} s")
    claims: list[float] = []
    settlements: list[float] = []
    for _ in range(ROUNDS):
        await one_batch(store, claims, settlements)
    line("replayed rows", claims, settlements)
    await drain(store)
    store = SqlOutboxStore(store._engine, keep=timedelta(microseconds=1))
    while await timed(store.clean(limit=2 * BATCH), took) == 2 * BATCH:
        pass
    print(f"removing {2 * BATCH} rows: {statistics.median(took):.1f} ms")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], *map(int, sys.argv[2:3]))
