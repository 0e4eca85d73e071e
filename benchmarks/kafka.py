"""reliamq on Kafka beside the bare client and FastStream: one cluster, one run.

    python -m benchmarks.kafka [MESSAGES] [--million]

Each round has fresh topics (RF 3, min.insync 2, 6 partitions), and everybody publishes and then consumes the same
orders, a pydantic model of about 250 bytes of JSON, one contestant after another.  The figures of a machine that is
shared move by a third from minute to minute: ratios are taken within a round, and the median of the rounds is printed.

Publish: acks=all, idempotent, 256 callers, each awaits its own confirm.  Bare aiokafka writes ready-made bytes: those,
and the headers, that reliamq writes.  Consume: from the first message handled to the last, so that joining a group is
no part of it.  Bare aiokafka commits every batch that it got and decodes nothing; reliamq and FastStream decode the
model and call a handler.  The CPU of this process for a message, with connecting and joining, moves less than rates do
where others use the machine.  FastStream's default commits before a message is handled; its safe setting commits after
each one, so it gets fewer of them.

Memory is that of a process which only consumes, at the first tenth and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import resource
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from tests.servers.kafka import KafkaCluster, kafka_cluster

from benchmarks.embedded import CALLERS, Order, order, publish as publish_by_reliamq
from reliamq import Reliamq
from reliamq.settings import Settings
from reliamq.topics import Topic
from reliamq_kafka.wire.producers import LARGEST_BATCH
from reliamq_kafka.wire.records import Headers, headers_of

PARTITIONS = 6
ROUNDS = 3
FEWEST = 2_000
GROUP = "bench"
BARE_BATCH = 500
COMMITTED_ONE_BY_ONE = 500
"""Messages for the contestant that commits after each: it would take minutes for more."""
Record = tuple[bytes, bytes | None, Headers]
SAFE_TOPIC = {"min.insync.replicas": "2", "unclean.leader.election.enable": "false", "retention.ms": "-1"}


class Clock:
    """From the first of a number of messages to the last.  finished: set at the last.

    What was handled together with the first was done before the clock ran, and is not counted.
    """

    def __init__(self, messages: int) -> None:
        self._left, self._counted = messages, 0
        self._began = self._ended = 0.0
        self.finished = asyncio.Event()

    def handled(self, messages: int = 1) -> None:
        """Some were, just now."""
        self._left -= messages
        if not self._began:
            self._began, self._counted = time.perf_counter(), self._left
        elif self._left <= 0 and not self._ended:
            self._ended = time.perf_counter()
            self.finished.set()

    @property
    def rate(self) -> float:
        """Messages a second."""
        return self._counted / (self._ended - self._began)


async def call_side_by_side(messages: int, one: Callable[[int], Awaitable[object]]) -> float:
    """What 256 callers reach, each awaiting one after another."""
    numbers = iter(range(messages))

    async def call() -> None:
        for number in numbers:
            await one(number)

    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(CALLERS):
            tasks.start_soon(call)
    return messages / (time.perf_counter() - began)


# --- the bare client --------------------------------------------------------------------------------------------------


def ready_records(messages: int) -> list[Record]:
    """What reliamq writes: body, key, headers."""
    writer = Topic("ready", Order, key=lambda order: order.account)
    ready = [writer.message(order(number)) for number in range(messages)]
    return [(one.body, one.key, headers_of(one)) for one in ready]


async def bare_publish(cluster: KafkaCluster, topic: str, records: Sequence[Record]) -> float:
    """What reliamq writes, without reliamq.  The batch size is reliamq's too: the default of 16 KiB is slower."""
    producer = AIOKafkaProducer(
        bootstrap_servers=cluster.addresses, acks="all", enable_idempotence=True, max_batch_size=LARGEST_BATCH
    )
    async with producer:

        async def send(number: int) -> None:
            body, key, headers = records[number]
            await producer.send_and_wait(topic, body, key=key, headers=headers)

        return await call_side_by_side(len(records), send)


async def bare_consume(cluster: KafkaCluster, topic: str, messages: int) -> float:
    """Committed after each batch; smaller ones take longer."""
    clock = Clock(messages)
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=cluster.addresses,
        group_id=f"bare-{uuid.uuid4()}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    async with consumer:
        while not clock.finished.is_set():
            batches = await consumer.getmany(timeout_ms=1000, max_records=BARE_BATCH)
            if batches:
                await consumer.commit()
                clock.handled(sum(map(len, batches.values())))
    return clock.rate


# --- reliamq ----------------------------------------------------------------------------------------------------------


def make(cluster: KafkaCluster, topic: str) -> tuple[Reliamq, Topic[Order]]:
    """An application with the settings that it has by itself."""
    app = Reliamq(Settings(broker=f"{cluster.url}?partitions={PARTITIONS}"))
    return app, app.topic(topic, Order, key=lambda order: order.account, groups=[GROUP], retention=timedelta(0))


async def reliamq_publish(cluster: KafkaCluster, topic: str, messages: int) -> float:
    """A model each."""
    app, orders = make(cluster, topic)
    async with app:
        return await publish_by_reliamq(orders, messages)


async def reliamq_consume(
    cluster: KafkaCluster, topic: str, messages: int, handled: Callable[[], None] = lambda: None
) -> float:
    """Receive, lanes, decode, handler, settle.  handled: called for each."""
    app, orders = make(cluster, topic)
    clock, stop = Clock(messages), anyio.Event()

    @app.handler(orders, group=GROUP, effects="repeatable")
    async def handle(order: Order) -> None:
        clock.handled()
        handled()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, stop)
        await clock.finished.wait()
        stop.set()
    return clock.rate


# --- FastStream -------------------------------------------------------------------------------------------------------


async def faststream_publish(cluster: KafkaCluster, topic: str, messages: int) -> float:
    """A model each, in its safe setting."""
    async with KafkaBroker(cluster.addresses, acks="all", enable_idempotence=True, logger=None) as broker:

        async def send(number: int) -> None:
            one = order(number)
            await broker.publish(one, topic, key=one.account.encode())

        return await call_side_by_side(messages, send)


async def faststream_consume(cluster: KafkaCluster, topic: str, messages: int, policy: AckPolicy) -> float:
    """One handler, as it is written in its tutorial."""
    clock = Clock(messages)
    async with KafkaBroker(cluster.addresses, logger=None) as broker:

        @broker.subscriber(topic, group_id=f"{policy}-{uuid.uuid4()}", auto_offset_reset="earliest", ack_policy=policy)
        async def handle(order: Order) -> None:
            clock.handled()

        await broker.start()
        await clock.finished.wait()
    return clock.rate


# --- one run ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def fresh_topics(cluster: KafkaCluster, *contestants: str) -> AsyncIterator[list[str]]:
    """One each, gone at the end.  reliamq's is as all of them; only its group has to be declared besides."""
    names = [f"bench-{one}-{uuid.uuid4().hex[:8]}" for one in contestants]
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.addresses)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, PARTITIONS, 3, topic_configs=SAFE_TOPIC) for name in names])
        await _wait_for_leaders(admin, names)
        yield names
        await admin.delete_topics(names)
    finally:
        await admin.close()


async def _wait_for_leaders(admin: AIOKafkaAdminClient, names: list[str]) -> None:
    while True:
        parts = [part for topic in await admin.describe_topics(names) for part in topic["partitions"]]
        if len(parts) == PARTITIONS * len(names) and all(part["leader"] >= 0 for part in parts):
            return
        await asyncio.sleep(0.1)


class Rates:
    """What each contestant reached, round by round: messages a second, and this process's CPU for one of them."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._rates: dict[str, list[float]] = defaultdict(list)
        self._cpu: dict[str, list[float]] = defaultdict(list)

    async def take(self, name: str, messages: int, turn: Awaitable[float]) -> None:
        """It is this contestant's turn."""
        before = time.process_time()
        self._rates[name].append(await turn)
        self._cpu[name].append((time.process_time() - before) / messages * 1e6)

    def show(self) -> None:
        """A line for each: its rate, its CPU, and reliamq's rate as a multiple of it."""
        for name, rates in self._rates.items():
            cpu = statistics.median(self._cpu[name])
            line = f"{self._what:8} {name:16} {statistics.median(rates):>9,.0f}/s {cpu:>7,.0f} µs"
            if name != "reliamq":
                ratios = [ours / theirs for ours, theirs in zip(self._rates["reliamq"], rates, strict=True)]
                line += f"   reliamq/{name} {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"
            print(line)


async def run_round(cluster: KafkaCluster, messages: int, publish: Rates, consume: Rates) -> None:
    """Everybody once."""
    records = ready_records(messages)
    few = min(messages, COMMITTED_ONE_BY_ONE)
    early, late = AckPolicy.ACK_FIRST, AckPolicy.NACK_ON_ERROR
    async with fresh_topics(cluster, "bare", "reliamq", "faststream") as (bare, ours, theirs):
        await publish.take("bare", messages, bare_publish(cluster, bare, records))
        await publish.take("reliamq", messages, reliamq_publish(cluster, ours, messages))
        await publish.take("FastStream", messages, faststream_publish(cluster, theirs, messages))
        await consume.take("bare", messages, bare_consume(cluster, bare, messages))
        await consume.take("reliamq", messages, reliamq_consume(cluster, ours, messages))
        await consume.take("FastStream", messages, faststream_consume(cluster, theirs, messages, early))
        await consume.take("FastStream safe", few, faststream_consume(cluster, theirs, few, late))


# --- memory -----------------------------------------------------------------------------------------------------------


def consume_alone(topic: str, messages: int) -> tuple[int, int, float]:
    """MiB at the first tenth and at the end, and the rate; of this process."""
    logging.disable(logging.CRITICAL)
    count, before = 0, 0

    def handled() -> None:
        nonlocal count, before
        count += 1
        if count == messages // 10:
            before = _peak_memory()

    rate = asyncio.run(reliamq_consume(kafka_cluster(), topic, messages, handled))
    return before, _peak_memory(), rate


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


async def measure_memory(cluster: KafkaCluster, messages: int) -> None:
    """Publish here, consume in a process that does nothing else."""
    async with fresh_topics(cluster, "memory") as (topic,):
        published = await reliamq_publish(cluster, topic, messages)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            working = asyncio.wrap_future(pool.submit(consume_alone, topic, messages))
            before, after, consumed = await working
    print(f"{messages:,} messages: published {published:,.0f}/s, consumed {consumed:,.0f}/s;", end=" ")
    print(f"worker's memory {before} → {after} MiB")


async def main(cluster: KafkaCluster, messages: int, backlog: int) -> None:
    """Compare, then measure memory."""
    publish, consume = Rates("publish"), Rates("consume")
    for _ in range(ROUNDS):
        await run_round(cluster, messages, publish, consume)
    publish.show()
    consume.show()
    await measure_memory(cluster, backlog)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kafka")
    parser.add_argument("messages", nargs="?", type=int, default=20_000, help="of each contestant in each round")
    parser.add_argument("--million", action="store_true", help="measure memory with 1,000,000 messages")
    given = parser.parse_args()
    if given.messages < FEWEST:
        parser.error(f"fewer than {FEWEST} messages are handled in a few batches and say nothing")
    asyncio.run(main(kafka_cluster(), given.messages, 1_000_000 if given.million else 50_000))
