"""reliamq on Kafka beside the bare client and FastStream: one cluster, one run.

    python -m benchmarks.kafka [MESSAGES]

Each round has fresh topics (RF 3, min.insync 2, 6 partitions), and everybody publishes and then consumes the same
orders, a pydantic model of about 250 bytes of JSON.  The figures of a shared machine move by a third from second to
second: who publishes takes turns of 5,000 messages with the others, ratios are taken within a round, and the median
of the rounds is printed.

Publish: acks=all, idempotent, 256 callers, each awaits its own confirm.  Bare aiokafka writes ready-made bytes: those,
and the headers, that reliamq writes.  FastStream has its turn twice: with the two headers that it writes by itself, and
with those that reliamq writes, ready-made.  Orders of 1 and 4 KiB are published too: FastStream sends batches of 16 KiB
at most, as the client does by itself.  Consume: from the first message handled to the last, so that joining a group is
no part of it.  Bare aiokafka commits every batch that it got and decodes nothing; reliamq and FastStream decode the
model and call a handler.  FastStream's default commits before a message is handled; its safe setting commits after each
one, so it gets fewer of them.  The CPU of this process for a message moves less than rates do where others use the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from tests.servers.kafka import KafkaCluster, kafka_cluster

from benchmarks import ours
from benchmarks.embedded import TEXT, Order, order
from benchmarks.kafka_backlog import fresh_topics, url_of
from benchmarks.measuring import Clock, Rates, Reading, Send, call_in_turns
from reliamq.topics import Topic
from reliamq_kafka.wire.producers import LARGEST_BATCH
from reliamq_kafka.wire.records import Headers, headers_of

ROUNDS = 6
FEWEST = 2_000
BARE_BATCH = 500
COMMITTED_ONE_BY_ONE = 500
"""Messages for the contestant that commits after each: it would take minutes for more."""
LARGER = {"publish 1 KiB": "x" * 900, "publish 4 KiB": "x" * 3900}
CONTESTANTS = ("bare", "reliamq", "faststream", "with-headers")
Record = tuple[bytes, bytes | None, Headers]


# --- the bare client --------------------------------------------------------------------------------------------------


def ready_records(messages: int, text: str) -> list[Record]:
    """What reliamq writes: body, key, headers."""
    writer = Topic("ready", Order, key=lambda order: order.account)
    ready = [writer.message(order(number, text)) for number in range(messages)]
    return [(one.body, one.key, headers_of(one)) for one in ready]


@asynccontextmanager
async def bare_publishing(cluster: KafkaCluster, topic: str, records: Sequence[Record]) -> AsyncIterator[Send]:
    """What reliamq writes, without reliamq.  The batch size is reliamq's too: the default of 16 KiB is slower."""
    producer = AIOKafkaProducer(
        bootstrap_servers=cluster.addresses, acks="all", enable_idempotence=True, max_batch_size=LARGEST_BATCH
    )

    async def send(number: int) -> None:
        body, key, headers = records[number]
        await producer.send_and_wait(topic, body, key=key, headers=headers)

    async with producer:
        yield send


async def bare_consume(cluster: KafkaCluster, topic: str, messages: int) -> Reading:
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
    return clock.reading


# --- FastStream -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def faststream_publishing(
    cluster: KafkaCluster, topic: str, text: str, records: Sequence[Record] = ()
) -> AsyncIterator[Send]:
    """A model each, in its safe setting.  records: whose headers it writes as well."""
    written = [{name: value.decode() for name, value in headers} for _, _, headers in records]
    async with KafkaBroker(cluster.addresses, acks="all", enable_idempotence=True, logger=None) as broker:

        async def send(number: int) -> None:
            one = order(number, text)
            headers = written[number] if written else None
            await broker.publish(one, topic, key=one.account.encode(), headers=headers)

        yield send


async def faststream_consume(cluster: KafkaCluster, topic: str, messages: int, policy: AckPolicy) -> Reading:
    """One handler, as it is written in its tutorial."""
    clock = Clock(messages)
    async with KafkaBroker(cluster.addresses, logger=None) as broker:

        @broker.subscriber(topic, group_id=f"{policy}-{uuid.uuid4()}", auto_offset_reset="earliest", ack_policy=policy)
        async def handle(order: Order) -> None:
            clock.handled()

        await broker.start()
        await clock.finished.wait()
    return clock.reading


# --- one run ----------------------------------------------------------------------------------------------------------


async def publish_to(
    cluster: KafkaCluster, topics: Sequence[str], messages: int, text: str, publish: Rates, begins: int
) -> None:
    """Everybody, to a topic of his own, in turns.  begins: who is first; it is another one each round, because topics
    that were just made, and others just deleted, cost whoever comes then.
    """
    ready = ready_records(messages, text)
    bare, own, theirs, same = topics
    async with (
        bare_publishing(cluster, bare, ready) as by_bare,
        ours.publishing(url_of(cluster), own, text) as by_us,
        faststream_publishing(cluster, theirs, text) as by_them,
        faststream_publishing(cluster, same, text, ready) as with_headers,
    ):
        sends = {"bare": by_bare, "reliamq": by_us, "FastStream": by_them, "with headers": with_headers}
        for name, reading in (await call_in_turns(messages, sends, begins)).items():
            publish.note(name, reading)


async def run_round(cluster: KafkaCluster, messages: int, publish: Rates, consume: Rates, begins: int) -> None:
    """Everybody once."""
    few = min(messages, COMMITTED_ONE_BY_ONE)
    early, late = AckPolicy.ACK_FIRST, AckPolicy.NACK_ON_ERROR
    async with fresh_topics(cluster, *CONTESTANTS) as topics:
        await publish_to(cluster, topics, messages, TEXT, publish, begins)
        bare, own, theirs, _ = topics
        await consume.take("bare", bare_consume(cluster, bare, messages))
        await consume.take("reliamq", ours.consume(url_of(cluster), own, messages))
        await consume.take("FastStream", faststream_consume(cluster, theirs, messages, early))
        await consume.take("FastStream safe", faststream_consume(cluster, theirs, few, late))


async def main(cluster: KafkaCluster, messages: int) -> None:
    publish, consume = Rates("publish"), Rates("consume")
    larger = {what: Rates(what) for what in LARGER}
    for begins in range(ROUNDS):
        await run_round(cluster, messages, publish, consume, begins)
        for what, text in LARGER.items():
            async with fresh_topics(cluster, *CONTESTANTS) as topics:
                await publish_to(cluster, topics, messages, text, larger[what], begins)
    for rates in (publish, *larger.values(), consume):
        rates.show()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kafka")
    parser.add_argument("messages", nargs="?", type=int, default=20_000, help="of each contestant in each round")
    given = parser.parse_args()
    if given.messages < FEWEST:
        parser.error(f"fewer than {FEWEST} messages are handled in a few batches and say nothing")
    asyncio.run(main(kafka_cluster(), given.messages))
