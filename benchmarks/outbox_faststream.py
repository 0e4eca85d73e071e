"""faststream-outbox as a contestant: from PostgreSQL to Kafka, as its tutorial writes it, with the settings that make
it fastest here: 32 workers, 500 rows a fetch, which are deleted 100 at a time.
"""

from __future__ import annotations

import asyncio
import time

from faststream.kafka import KafkaBroker
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData, func, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from tests.servers.kafka import KafkaCluster

from benchmarks.kept_rows import TEXT, Order
from benchmarks.measuring import Reading

__all__ = ["relayed"]

WORKERS, FETCHED, DELETED, QUEUE = 32, 500, 100, "orders"
metadata = MetaData()
table = make_outbox_table(metadata, table_name="faststream_outbox")


async def relayed(cluster: KafkaCluster, url: str, topic: str, rows: int) -> Reading:
    """The rate of one process that drains so many rows."""
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"), pool_size=WORKERS + 8)
    try:
        return await _relayed(engine, cluster, topic, rows)
    finally:
        await engine.dispose()


async def _relayed(engine: AsyncEngine, cluster: KafkaCluster, topic: str, rows: int) -> Reading:
    outbox = OutboxBroker(engine, outbox_table=table, logger=None)
    kafka = KafkaBroker(cluster.addresses, acks="all", enable_idempotence=True, logger=None)

    @kafka.publisher(topic)
    @outbox.subscriber(
        QUEUE,
        max_workers=WORKERS,
        fetch_batch_size=FETCHED,
        terminal_flush_batch_size=DELETED,
        min_fetch_interval=0.01,
        max_fetch_interval=0.1,
    )
    async def relay(order: Order) -> Order:
        return order

    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await _fill(connection, outbox, rows)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("VACUUM ANALYZE"))
    async with kafka:
        began, cpu = time.perf_counter(), time.process_time()
        async with outbox:
            while await _left(engine):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.02)
            return Reading(rows / (time.perf_counter() - began), (time.process_time() - cpu) / rows * 1e6)


async def _fill(connection: AsyncConnection, outbox: OutboxBroker, rows: int) -> None:
    orders = [Order(number=n, account=f"a-{n % 1000}", amount=n % 97, text=TEXT) for n in range(rows)]
    await outbox.publish_batch(*orders, queue=QUEUE, session=connection)


async def _left(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(select(func.count()).select_from(table)) or 0)
