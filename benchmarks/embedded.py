"""The embedded broker against bare SQLite doing the same commits.

    python -m benchmarks.embedded [MESSAGES] [BACKLOG]

Publish: 256 callers, each awaits its own confirm; a pydantic model of about 250 bytes of JSON.  Consume: decoded, a
lease kept in memory, acknowledged after the handler.  The backlog is consumed without marks, because a store of marks
in memory grows by its nature, and what is asked is whether the worker does.  Bare SQLite: the same bytes, inserted
256 a commit and deleted 500 a commit, synchronous = FULL.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice, pairwise
from pathlib import Path

import anyio
from pydantic import BaseModel

from benchmarks.measuring import CALLERS, Reading, call_side_by_side
from reliamq import Reliamq
from reliamq.handlers.plan import Effects
from reliamq.idempotency import MemoryLeaseStore
from reliamq.settings import Settings, WorkerSettings
from reliamq.topics import Topic

TEXT = "x" * 150


class Order(BaseModel):
    number: int
    account: str
    amount: int
    text: str


def order(number: int, text: str = TEXT) -> Order:
    return Order(number=number, account=f"account-{number % 1000}", amount=number % 97, text=text)


def bare_sqlite(path: Path, messages: int) -> tuple[float, float]:
    """Inserts and deletes a second."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE message (seq INTEGER PRIMARY KEY, key TEXT, body BLOB)")
    bodies = [(f"account-{n % 1000}", order(n).model_dump_json().encode()) for n in range(messages)]
    began = time.perf_counter()
    rows: Iterator[tuple[str, bytes]] = iter(bodies)
    while batch := list(islice(rows, CALLERS)):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO message (key, body) VALUES (?, ?)", batch)
        connection.execute("COMMIT")
    inserted = time.perf_counter() - began
    began = time.perf_counter()
    while True:
        connection.execute("BEGIN IMMEDIATE")
        taken = connection.execute("SELECT seq, body FROM message ORDER BY seq LIMIT 500").fetchall()
        connection.executemany("DELETE FROM message WHERE seq = ?", [(seq,) for seq, _ in taken])
        connection.execute("COMMIT")
        if not taken:
            break
    deleted = time.perf_counter() - began
    connection.close()
    return messages / inserted, messages / deleted


async def publish(topic: Topic[Order], messages: int, callers: int = CALLERS, text: str = TEXT) -> Reading:
    """A model each, until it is confirmed."""

    async def one(number: int) -> None:
        await topic.publish(order(number, text))

    return await call_side_by_side(messages, one, callers)


async def consume(app: Reliamq, topic: Topic[Order], messages: int, effects: Effects = "lease") -> list[float]:
    """Handled messages a second, in ten parts from the first to the last."""
    marks = [time.perf_counter()]
    stop = asyncio.Event()
    part = messages // 10
    handled = 0

    @app.handler(topic, group="bench", effects=effects, concurrency=64)
    async def handle(order: Order) -> None:
        nonlocal handled
        handled += 1
        if handled % part == 0:
            marks.append(time.perf_counter())
            if len(marks) == 11:
                stop.set()

    ending = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, ending)
        await stop.wait()
        ending.set()
    return [part / (after - before) for before, after in pairwise(marks)]


def make(folder: str) -> tuple[Reliamq, Topic[Order]]:
    worker = WorkerSettings(prefetch=1000)
    app = Reliamq(Settings(broker=f"embedded:///{folder}/broker.db", worker=worker), lease_store=MemoryLeaseStore())
    return app, app.topic("bench", Order, key=lambda order: order.account, groups=["bench"], retention=timedelta(0))


async def main(messages: int, backlog: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bare_in, bare_out = bare_sqlite(Path(folder) / "bare.db", messages)
        app, topic = make(folder)
        async with app:
            published = (await publish(topic, messages)).rate
            rates = await consume(app, topic, messages)
        handled = messages / sum(messages / 10 / rate for rate in rates)
        print(f"publish  {published:>9,.0f}/s   bare SQLite {bare_in:>9,.0f}/s   ratio {published / bare_in:.2f}")
        print(f"consume  {handled:>9,.0f}/s   bare SQLite {bare_out:>9,.0f}/s   ratio {handled / bare_out:.2f}")
    if not backlog:
        return
    with tempfile.TemporaryDirectory() as folder:
        app, topic = make(folder)
        async with app:
            published = (await publish(topic, backlog, callers=512)).rate
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rates = await consume(app, topic, backlog, "repeatable")
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"backlog of {backlog:,}: published {published:,.0f}/s; memory {before >> 10} → {after >> 10} MiB;")
        print(f"consumed {rates[0]:,.0f}/s at first, {rates[-1]:,.0f}/s at last, ratio {rates[-1] / rates[0]:.2f}")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    given = [int(argument) for argument in sys.argv[1:]]
    anyio.run(main, *(given + [50_000, 0][len(given) :]))
