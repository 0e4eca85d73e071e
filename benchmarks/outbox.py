"""From an outbox on PostgreSQL to Kafka: reliamq's relays beside the loop that a careful hand would write.

    python -m benchmarks.outbox [ROWS]

Each round fills a table for each with the same rows (about 250 bytes of JSON, 1,000 keys), and two relays drain it to a
topic of three replicas.  The bare loop locks 500 rows that nobody else has (SKIP LOCKED), sends them all, waits for the
confirms, deletes them, and keeps no order: two of its relays hold neighbouring rows of one key.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import anyio
import psycopg
from aiokafka import AIOKafkaProducer
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine
from tests.servers.kafka import KafkaCluster, kafka_cluster
from tests.servers.postgresql import run_postgresql

from benchmarks.kafka_backlog import fresh_topics, url_of
from benchmarks.kept_rows import fill, orders, tidy
from benchmarks.measuring import Rates, Reading
from reliamq import outbox
from reliamq.backends import open_backend
from reliamq.database import open_engine
from reliamq.outbox import OutboxMessage, Relay, SqlOutboxStore
from reliamq_kafka.wire.producers import LARGEST_BATCH

ROUNDS, RELAYS, BATCH = 3, 2, 500
CLAIM = """SELECT position, key, body FROM reliamq_outbox ORDER BY position LIMIT 500 FOR UPDATE SKIP LOCKED"""


async def left(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(select(func.count()).select_from(OutboxMessage)) or 0)


async def drained(engine: AsyncEngine, rows: int, relays: list[Awaitable[None]], stop: Callable[[], None]) -> Reading:
    began, cpu = time.perf_counter(), time.process_time()
    running = [asyncio.ensure_future(relay) for relay in relays]
    while await left(engine):  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.02)
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    stop()
    await asyncio.gather(*running)
    return Reading(rows / seconds, spent / rows * 1e6)


async def bare(cluster: KafkaCluster, url: str, engine: AsyncEngine, topic: str, rows: int) -> Reading:
    stopped = asyncio.Event()
    producer = AIOKafkaProducer(
        bootstrap_servers=cluster.addresses, acks="all", enable_idempotence=True, max_batch_size=LARGEST_BATCH
    )

    async def relay() -> None:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            while not stopped.is_set():
                found = await (await connection.execute(CLAIM)).fetchall()
                sent = [await producer.send(topic, bytes(body), key=bytes(key)) for _, key, body in found]
                await asyncio.gather(*sent)
                positions = [position for position, _, _ in found]
                await connection.execute("DELETE FROM reliamq_outbox WHERE position = ANY(%s)", (positions,))
                await connection.commit()
                if not found:
                    await asyncio.sleep(0.01)

    async with producer:
        return await drained(engine, rows, [relay() for _ in range(RELAYS)], stopped.set)


async def ours(cluster: KafkaCluster, engine: AsyncEngine, rows: int) -> Reading:
    stop = anyio.Event()
    async with open_backend(url_of(cluster)).publisher() as publisher:
        relays = [Relay(SqlOutboxStore(engine), publisher, batch=BATCH) for _ in range(RELAYS)]
        return await drained(engine, rows, [relay.run(stop) for relay in relays], stop.set)


async def main(cluster: KafkaCluster, url: str, rows: int) -> None:
    rates = Rates("relay")
    async with open_engine(url) as engine:
        await outbox.create_tables_async(engine)
        for _ in range(ROUNDS):
            async with fresh_topics(cluster, "bare", "reliamq") as (theirs, own):
                orders.name = theirs
                await fill(engine, rows)
                await tidy(engine)
                await rates.take("bare", bare(cluster, url, engine, theirs, rows))
                orders.name = own
                await fill(engine, rows)
                await tidy(engine)
                await rates.take("reliamq", ours(cluster, engine, rows))
    rates.show()


if __name__ == "__main__":
    with run_postgresql() as server, server.fresh_database() as database:
        anyio.run(main, kafka_cluster(), database, int(sys.argv[1]) if len(sys.argv) > 1 else 40_000)
