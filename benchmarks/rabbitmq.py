"""reliamq on RabbitMQ beside the bare client and FastStream: one cluster, one run.

    python -m benchmarks.rabbitmq [MESSAGES]

Each round has fresh queues, and everybody publishes and then consumes the same orders, a pydantic model of about 250
bytes of JSON, one contestant after another.  The figures of a machine that is shared move by a third from minute to
minute: ratios are taken within a round, and the median of the rounds is printed.

Publish: confirmed, persistent, mandatory, to quorum queues of three members; 256 callers, each awaits its own confirm.
Bare aio-pika writes ready-made bytes: those, and the headers, that reliamq writes.  Consume: from the first message
handled to the last.  Bare aio-pika acknowledges each message and decodes nothing; reliamq and FastStream decode the
model and call a handler, and acknowledge when it is done.  Everybody has one queue (reliamq: one lane), because a
message costs the brokers more the more queues it is spread over; what reliamq reaches with the four lanes that it has
by itself is beside it.  Everybody connects to the first node, and it leads all queues: to one that another node leads a
message costs half as much again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue
from tests.servers.rabbitmq import RabbitmqCluster, rabbitmq_cluster

from benchmarks import ours
from benchmarks.embedded import Order, order
from benchmarks.measuring import Clock, Rates, Reading, call_side_by_side
from reliamq.spi import cloudevent_attributes
from reliamq.topics import Topic

ROUNDS = 3
FEWEST = 2_000
PREFETCH = 500
POLICY = "leaders-of-the-benchmark"
QUORUM = {"x-queue-type": "quorum", "x-quorum-initial-group-size": 3}


def first_node(cluster: RabbitmqCluster) -> str:
    """Of the cluster, as reliamq's URL."""
    return cluster.url.partition(",")[0]


def amqp_url(cluster: RabbitmqCluster) -> str:
    """The same, as everybody else spells it."""
    return first_node(cluster).replace("rabbitmq://", "amqp://")


# --- the bare client --------------------------------------------------------------------------------------------------


def ready_messages(messages: int) -> list[aio_pika.Message]:
    """What reliamq writes: body and headers."""
    writer = Topic("ready", Order, key=lambda order: order.account)
    ready = [writer.message(order(number)) for number in range(messages)]
    return [
        aio_pika.Message(
            one.body,
            content_type=one.content_type,
            headers={f"cloudEvents:{name}": text for name, text in cloudevent_attributes(one).items()},
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=one.id,
        )
        for one in ready
    ]


async def bare_publish(cluster: RabbitmqCluster, queue: str, messages: Sequence[aio_pika.Message]) -> Reading:
    """What reliamq writes, without reliamq."""
    async with await aio_pika.connect(amqp_url(cluster)) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = channel.default_exchange

        async def send(number: int) -> None:
            await exchange.publish(messages[number], queue, mandatory=True)

        return await call_side_by_side(len(messages), send)


async def bare_consume(cluster: RabbitmqCluster, name: str, messages: int) -> Reading:
    """Acknowledged one by one."""
    clock = Clock(messages)

    async def handle(message: AbstractIncomingMessage) -> None:
        await message.ack()
        clock.handled()

    async with await aio_pika.connect(amqp_url(cluster)) as connection:
        channel = await connection.channel()
        await channel.set_qos(PREFETCH)
        queue = await channel.get_queue(name)
        await queue.consume(handle)
        await clock.finished.wait()
    return clock.reading


# --- FastStream -------------------------------------------------------------------------------------------------------


def quorum_queue(name: str) -> RabbitQueue:
    """As it is there."""
    return RabbitQueue(name, queue_type=QueueType.QUORUM, durable=True, arguments={"x-quorum-initial-group-size": 3})


async def faststream_publish(cluster: RabbitmqCluster, queue: str, messages: int) -> Reading:
    """A model each, in its safe setting."""
    channel = Channel(on_return_raises=True, publisher_confirms=True)
    async with RabbitBroker(amqp_url(cluster), default_channel=channel, logger=None) as broker:

        async def send(number: int) -> None:
            await broker.publish(order(number), queue, persist=True, mandatory=True)

        return await call_side_by_side(messages, send)


async def faststream_consume(cluster: RabbitmqCluster, queue: str, messages: int) -> Reading:
    """One handler, as it is written in its tutorial; it acknowledges what was handled."""
    clock = Clock(messages)
    channel = Channel(prefetch_count=PREFETCH)
    async with RabbitBroker(amqp_url(cluster), default_channel=channel, logger=None) as broker:

        @broker.subscriber(quorum_queue(queue))
        async def handle(order: Order) -> None:
            clock.handled()

        await broker.start()
        await clock.finished.wait()
    return clock.reading


# --- one run ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def fresh_queues(cluster: RabbitmqCluster, *contestants: str) -> AsyncIterator[list[str]]:
    """One each; all queues of the benchmark are gone at the end: a cluster with hundreds is slower."""
    names = [f"bench-{one}-{uuid.uuid4().hex[:8]}" for one in contestants]
    async with await aio_pika.connect(amqp_url(cluster)) as connection:
        channel = await connection.channel()
        for name in names:
            await channel.declare_queue(name, durable=True, arguments=dict(QUORUM))
        yield names
        for queue in cluster.call("queues?columns=name"):
            if "bench-" in queue["name"]:
                await channel.queue_delete(queue["name"])


async def run_round(cluster: RabbitmqCluster, messages: int, publish: Rates, consume: Rates) -> None:
    """Everybody once."""
    ready, topic = ready_messages(messages), f"bench-{uuid.uuid4().hex[:8]}"
    url = first_node(cluster)
    one_lane = f"{url}?lanes=1"
    async with fresh_queues(cluster, "bare", "faststream") as (bare, theirs):
        await publish.take("bare", bare_publish(cluster, bare, ready))
        await publish.take("reliamq", ours.publish(one_lane, topic, messages))
        await publish.take("reliamq, 4 lanes", ours.publish(url, f"{topic}-wide", messages))
        await publish.take("FastStream", faststream_publish(cluster, theirs, messages))
        await consume.take("bare", bare_consume(cluster, bare, messages))
        await consume.take("reliamq", ours.consume(one_lane, topic, messages))
        await consume.take("reliamq, 4 lanes", ours.consume(url, f"{topic}-wide", messages))
        await consume.take("FastStream", faststream_consume(cluster, theirs, messages))


async def main(cluster: RabbitmqCluster, messages: int) -> None:
    publish, consume = Rates("publish"), Rates("consume")
    leaders = '{"queue-leader-locator": "client-local"}'
    cluster.control(cluster.nodes[0], "set_policy", POLICY, "bench-", leaders, "--apply-to", "queues")
    for _ in range(ROUNDS):
        await run_round(cluster, messages, publish, consume)
    cluster.control(cluster.nodes[0], "clear_policy", POLICY)
    publish.show()
    consume.show()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rabbitmq")
    parser.add_argument("messages", nargs="?", type=int, default=20_000, help="of each contestant in each round")
    given = parser.parse_args()
    if given.messages < FEWEST:
        parser.error(f"fewer than {FEWEST} messages are handled in a few batches and say nothing")
    asyncio.run(main(rabbitmq_cluster(), given.messages))
