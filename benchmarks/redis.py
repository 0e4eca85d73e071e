"""reliamq on Redis Streams beside the bare client and FastStream: one server with a replica, one run.

    python -m benchmarks.redis [MESSAGES] [--valkey]

Each round has fresh streams, and everybody publishes and then consumes the same orders, a pydantic model of about 250
bytes of JSON, one contestant after another.  The figures of a machine that is shared move by a third from minute to
minute: ratios are taken within a round, and the median of the rounds is printed.

Publish: 256 callers, each awaits its own answer.  reliamq confirms what is on the primary's disk and has reached the
replica; bare redis-py and FastStream know only that the primary has it (its AOF is written before it answers).

Consume: from the first message handled to the last, each acknowledged when it is handled.  FastStream acknowledges each
by itself, bare redis-py a batch of 500 at once, and decodes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from faststream.redis import RedisBroker, StreamSub
from redis.asyncio import Redis
from tests.servers.redis import RedisServers, ValkeyServers

from benchmarks import ours
from benchmarks.embedded import Order, order
from benchmarks.measuring import Clock, Rates, Reading, call_side_by_side
from reliamq.topics import Topic
from reliamq_redis.wire.records import fields_of

ROUNDS = 3
FEWEST = 2_000
GROUP, CONSUMER, BATCH = "bench", "one", 500


def redis_url(servers: RedisServers) -> str:
    """As everybody else spells it."""
    return "redis" + servers.url[servers.url.index("://") :]


def client(servers: RedisServers) -> Redis:
    """The bare client."""
    parts = urlsplit(redis_url(servers))
    return Redis.from_url(parts.geturl(), max_connections=300)


# --- the bare client --------------------------------------------------------------------------------------------------


def ready_fields(messages: int) -> list[dict[str | bytes, str | bytes]]:
    """What reliamq writes: body and attributes."""
    writer = Topic("ready", Order, key=lambda order: order.account)
    flat = [fields_of(writer.message(order(number))) for number in range(messages)]
    return [dict(zip(one[::2], one[1::2], strict=True)) for one in flat]


async def bare_publish(servers: RedisServers, stream: str, ready: Sequence[dict[str | bytes, str | bytes]]) -> Reading:
    """What reliamq writes, without reliamq, and without asking the replica."""
    async with client(servers) as bare:

        async def send(number: int) -> None:
            await bare.xadd(stream, ready[number])

        return await call_side_by_side(len(ready), send)


async def bare_consume(servers: RedisServers, stream: str, messages: int) -> Reading:
    """One XACK for what one XREADGROUP brought."""
    clock = Clock(messages)
    async with client(servers) as bare:
        await bare.xgroup_create(stream, GROUP, id="0")
        while not clock.finished.is_set():
            ((_, entries),) = await bare.xreadgroup(GROUP, CONSUMER, {stream: ">"}, count=BATCH, block=1000)
            await bare.xack(stream, GROUP, *[name for name, _ in entries])
            clock.handled(len(entries))
    return clock.reading


# --- FastStream -------------------------------------------------------------------------------------------------------


async def faststream_publish(servers: RedisServers, stream: str, messages: int) -> Reading:
    """A model each."""
    async with RedisBroker(redis_url(servers), logger=None, max_connections=300) as broker:

        async def send(number: int) -> None:
            await broker.publish(order(number), stream=stream)

        return await call_side_by_side(messages, send)


async def faststream_consume(servers: RedisServers, stream: str, messages: int) -> Reading:
    """One handler, as it is written in its tutorial; it acknowledges what was handled."""
    clock = Clock(messages)
    async with RedisBroker(redis_url(servers), logger=None) as broker:

        @broker.subscriber(stream=StreamSub(stream, group=GROUP, consumer=CONSUMER, last_id=">", max_records=BATCH))
        async def handle(order: Order) -> None:
            clock.handled()

        await broker.start()
        await clock.finished.wait()
    return clock.reading


# --- one run ----------------------------------------------------------------------------------------------------------


async def run_round(servers: RedisServers, messages: int, publish: Rates, consume: Rates) -> None:
    """Everybody once."""
    ready, name = ready_fields(messages), uuid.uuid4().hex[:8]
    bare, theirs, topic = f"bench-bare-{name}", f"bench-faststream-{name}", f"bench-{name}"
    async with client(servers) as one:  # a group that is made later starts at what comes then
        await one.xgroup_create(theirs, GROUP, id="0", mkstream=True)
        await publish.take("bare", bare_publish(servers, bare, ready))
        await publish.take("reliamq", ours.publish(servers.url, topic, messages))
        await publish.take("FastStream", faststream_publish(servers, theirs, messages))
        await consume.take("bare", bare_consume(servers, bare, messages))
        await consume.take("reliamq", ours.consume(servers.url, topic, messages))
        await consume.take("FastStream", faststream_consume(servers, theirs, messages))
        await one.delete(bare, theirs)


async def main(servers: RedisServers, messages: int) -> None:
    publish, consume = Rates("publish"), Rates("consume")
    for _ in range(ROUNDS):
        await run_round(servers, messages, publish, consume)
    publish.show()
    consume.show()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redis")
    parser.add_argument("messages", nargs="?", type=int, default=20_000, help="of each contestant in each round")
    parser.add_argument("--valkey", action="store_true", help="on Valkey 8, whose WAITAOF asks the replica's disk too")
    given = parser.parse_args()
    if given.messages < FEWEST:
        parser.error(f"fewer than {FEWEST} messages are handled in a few batches and say nothing")
    asyncio.run(main((ValkeyServers if given.valkey else RedisServers).shared(), given.messages))
