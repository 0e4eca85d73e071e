"""The outbox on PostgreSQL, beside what a careful hand would write.

    python -m benchmarks.outbox [relay|backlog|foreign|latency|adding|notify] [ROWS]

relay: from the table to Kafka, by two relays, beside the bare loop: it locks 500 rows that nobody else has (SKIP
LOCKED), sends them all, waits for the confirms, deletes them, and keeps no order.  Rows of about 250 bytes, 1,000 keys,
topics of three replicas; reliamq with its own settings.  faststream-outbox keeps no order either; it gets a tenth of
the rows.
backlog: reliamq's rate at ROWS and at ten thousand.
foreign: beside a transaction of somebody else that is open all the while and keeps dead rows from being removed.
latency: from the commit to the confirm, one message at a time: woken in the application's process, and by polling.
adding: what a message costs a transaction of SQLAlchemy, beside the same row added by hand, without the order of a key.
notify: transactions a second of sixteen writers, without the trigger that tells relays, and with it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import anyio
import psycopg
from aiokafka import AIOKafkaProducer
from sqlalchemy import BigInteger, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from tests.servers.kafka import KafkaCluster, kafka_cluster
from tests.servers.postgresql import run_postgresql

from benchmarks.kafka_backlog import fresh_topics, url_of
from benchmarks.kept_rows import Order, fill, orders, tidy
from benchmarks.measuring import Rates, Reading
from benchmarks.outbox_faststream import relayed
from reliamq import outbox
from reliamq.backends import open_backend
from reliamq.database import open_engine
from reliamq.outbox import OutboxMessage, Relay, SqlOutboxStore
from reliamq.outbox.table import columns_of
from reliamq.spi import GroupSpec, Message, Outcome, Publisher, TopicSpec
from reliamq_kafka.wire.producers import LARGEST_BATCH

ROUNDS, RELAYS, ROWS = 3, 2, 40_000
FEW = 10_000
MESSAGES = 200
CLAIM = """SELECT position, key, body FROM reliamq_outbox ORDER BY position LIMIT 500 FOR UPDATE SKIP LOCKED"""


async def left(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(select(func.count()).select_from(OutboxMessage)) or 0)


async def drained(engine: AsyncEngine, rows: int, relays: list[Awaitable[None]], stop: Callable[[], None]) -> Reading:
    began, cpu = time.perf_counter(), time.process_time()
    running = [asyncio.ensure_future(relay) for relay in relays]
    while await left(engine):  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.02 if rows <= ROWS else 0.5)  # counting many rows is not free
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


async def declare(cluster: KafkaCluster, topic: str) -> None:
    async with open_backend(url_of(cluster)).storage() as storage:
        await storage.declare([TopicSpec(topic, (GroupSpec("nobody"),), retention=timedelta(days=1))])


async def ours(cluster: KafkaCluster, engine: AsyncEngine, rows: int) -> Reading:
    stop = anyio.Event()
    await declare(cluster, orders.name)
    async with open_backend(url_of(cluster)).publisher() as publisher:
        relays = [Relay(SqlOutboxStore(engine), publisher) for _ in range(RELAYS)]
        return await drained(engine, rows, [relay.run(stop) for relay in relays], stop.set)


async def filled(engine: AsyncEngine, topic: str, rows: int) -> None:
    orders.name = topic
    await fill(engine, rows)
    await tidy(engine)


# --- rates ------------------------------------------------------------------------------------------------------------


async def relay(cluster: KafkaCluster, url: str, engine: AsyncEngine, rows: int) -> None:
    rates = Rates("relay")
    for _ in range(ROUNDS):
        async with fresh_topics(cluster, "bare", "reliamq") as (theirs, own):
            await filled(engine, theirs, rows)
            await rates.take("bare", bare(cluster, url, engine, theirs, rows))
            await filled(engine, own, rows)
            await rates.take("reliamq", ours(cluster, engine, rows))
            await rates.take("faststream-outbox", relayed(cluster, url, theirs, rows // 10))
    rates.show()


async def backlog(cluster: KafkaCluster, url: str, engine: AsyncEngine, rows: int) -> None:
    rates = Rates("backlog")
    async with fresh_topics(cluster, "reliamq") as (topic,):
        for _ in range(ROUNDS):
            await filled(engine, topic, FEW)
            await rates.take(f"of {FEW}", ours(cluster, engine, FEW))
        await filled(engine, topic, rows)
        await rates.take(f"of {rows}", ours(cluster, engine, rows))
    rates.show()


async def foreign(cluster: KafkaCluster, url: str, engine: AsyncEngine, rows: int) -> None:
    rates = Rates("foreign transaction")
    async with fresh_topics(cluster, "reliamq") as (topic,):
        for _ in range(ROUNDS):
            await filled(engine, topic, rows)
            await rates.take("alone", ours(cluster, engine, rows))
            await filled(engine, topic, rows)
            async with engine.connect() as other:
                await other.execution_options(isolation_level="REPEATABLE READ")
                await other.execute(text("SELECT pg_current_xact_id()"))
                await rates.take("beside it", ours(cluster, engine, rows))
                await other.rollback()
    rates.show()


# --- latency ----------------------------------------------------------------------------------------------------------


class Stamped:
    """Notes when each message was confirmed."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher, self.route = publisher, publisher.route
        self.confirmed: dict[str, asyncio.Future[float]] = {}

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        outcomes = await self._publisher.send(batch, deadline=deadline, chained=chained)
        for outcome in outcomes:
            self.confirmed[outcome.message_id].set_result(time.perf_counter())
        return outcomes


async def latency(cluster: KafkaCluster, url: str, engine: AsyncEngine, rows: int) -> None:
    async with fresh_topics(cluster, "reliamq") as (orders.name,), open_backend(url_of(cluster)).publisher() as sender:
        await declare(cluster, orders.name)
        stamped = Stamped(sender)
        for how in ("woken", "by polling"):
            stop = anyio.Event()
            running = asyncio.ensure_future(Relay(SqlOutboxStore(engine), stamped).run(stop))
            taken = [await one_latency(engine, stamped, wakes=how == "woken") for _ in range(MESSAGES)]
            stop.set()
            await running
            milliseconds = sorted(seconds * 1000 for seconds in taken[10:])
            late = milliseconds[int(len(milliseconds) * 0.99)]
            print(f"commit to confirm, {how}: median {statistics.median(milliseconds):.1f} ms, 99 % {late:.1f} ms")


async def one_latency(engine: AsyncEngine, stamped: Stamped, *, wakes: bool) -> float:
    await asyncio.sleep(0.05 + time.perf_counter() % 0.05)  # at any moment of the poll
    message_id = f"{time.perf_counter_ns()}"
    stamped.confirmed[message_id] = asyncio.get_running_loop().create_future()
    order = Order(number=1, account="a", amount=1, text="x" * 150)
    if wakes:
        async with AsyncSession(engine) as session, session.begin():
            outbox.add(session, orders, order, id=message_id)
    else:
        async with engine.begin() as connection:
            await connection.execute(insert(OutboxMessage), columns_of(orders.message(order, id=message_id)))
    committed = time.perf_counter()
    return max(0.0, await stamped.confirmed[message_id] - committed)


# --- adding -----------------------------------------------------------------------------------------------------------


class Tables(DeclarativeBase):
    pass


class Business(Tables):
    """Whatever the transaction is about."""

    __tablename__ = "business"
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True)


async def adding(cluster: KafkaCluster, url: str, engine: AsyncEngine, rows: int) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Tables.metadata.create_all)
    costs: dict[str, list[float]] = {"nothing": [], "bare": [], "reliamq": []}
    for number in range(rows // 10):
        for what, taken in costs.items():  # in turn, so that what else the machine does befalls all of them
            taken.append(await one_transaction(engine, what, number))
    async with engine.begin() as connection:
        await connection.execute(text("TRUNCATE reliamq_outbox"))  # nobody relays them
    middle = {what: statistics.median(taken) * 1000 for what, taken in costs.items()}
    ratio = (middle["reliamq"] - middle["nothing"]) / (middle["bare"] - middle["nothing"])
    print(" · ".join(f"{what} {taken:.2f} ms" for what, taken in middle.items()), f"· adding is {ratio:.2f} of bare")


async def one_transaction(engine: AsyncEngine, what: str, number: int) -> float:
    order = Order(number=number, account=f"a-{number % 1000}", amount=1, text="x" * 150)
    began = time.perf_counter()
    async with AsyncSession(engine) as session, session.begin():
        session.add(Business())
        if what == "reliamq":
            outbox.add(session, orders, order)
        elif what == "bare":
            session.add(OutboxMessage(**columns_of(orders.message(order))))
    return time.perf_counter() - began


# --- what the trigger costs -------------------------------------------------------------------------------------------

WRITERS = 16


async def notify(cluster: KafkaCluster, url: str, engine: AsyncEngine, rows: int) -> None:
    rates = Rates("notify")
    for _ in range(ROUNDS):
        await rates.take("without", written(url, rows // 10))
        await outbox.create_notify_trigger_async(engine)
        await rates.take("with", written(url, rows // 10))
        async with engine.begin() as connection:
            await connection.execute(text("DROP TRIGGER reliamq_outbox_notify ON reliamq_outbox"))
            await connection.execute(text("TRUNCATE reliamq_outbox"))
    rates.show()


async def written(url: str, rows: int) -> Reading:
    numbers = iter(range(rows))

    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            for number in numbers:
                order = Order(number=number, account=f"a-{number}", amount=1, text="x" * 150)
                await outbox.insert_async(connection, orders, order)
                await connection.commit()

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*[write() for _ in range(WRITERS)])
    return Reading(rows / (time.perf_counter() - began), (time.process_time() - cpu) / rows * 1e6)


PARTS = {part.__name__: part for part in (relay, backlog, foreign, latency, adding, notify)}


async def main(cluster: KafkaCluster, url: str, chosen: Sequence[str], rows: int) -> None:
    async with open_engine(url) as engine:
        await outbox.create_tables_async(engine)
        for name in chosen:
            await PARTS[name](cluster, url, engine, rows)


if __name__ == "__main__":
    names, count = [one for one in sys.argv[1:] if one in PARTS], ROWS
    with suppress(ValueError, IndexError):
        count = int(sys.argv[-1])
    with run_postgresql(fsync="on") as server, server.fresh_database() as database:
        anyio.run(main, kafka_cluster(), database, names or ["relay", "latency", "adding"], count)
