"""A lane in its hard moments: full servers, lost answers, others' tokens, what a failover forgot (C1, C6, C9-C12)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta

import anyio
import pytest

from reliamq.spi import Ack, Confirmation, Delivery, Rejection, RejectionReason, Retry
from reliamq_redis.catalog.names import LaneKeys, stream_of
from reliamq_redis.consuming.membership import SHORTEST_LEASE_SECONDS
from reliamq_redis.consuming.subscription import RedisSubscription, open_subscription
from reliamq_redis.consuming.window import ROOM_BYTES
from reliamq_redis.publisher import open_publisher
from reliamq_redis.scripts import script
from reliamq_redis.settings import RedisSettings
from tests.redis.steps import LEASE, bodies, declare, drain, message, soon
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
def settings(settings: RedisSettings) -> RedisSettings:
    """With one lane a topic."""
    return settings.model_copy(update={"lanes": 1})


async def publish(settings: RedisSettings, topic: str, *texts: str) -> None:
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send([message(topic, each) for each in texts], deadline=soon())
    assert all(isinstance(one, Confirmation) for one in outcomes), outcomes


async def take(member: RedisSubscription, count: int, limit: int = 100) -> list[Delivery]:
    taken: list[Delivery] = []
    with anyio.fail_after(30):
        while len(taken) < count:
            taken += await member.receive(limit, max_bytes=1 << 30, wait=timedelta(seconds=5))
    return taken


def pending(servers: RedisServers, topic: str, group: str = "g") -> int:
    with servers.client(servers.primary) as primary:
        found: int = primary.xpending(stream_of(topic, 0), group)["pending"]
        return found


# --- a server that takes no more ----------------------------------------------------------------------------------


@contextmanager
def full(servers: RedisServers) -> Iterator[None]:
    with servers.client(servers.primary) as primary:
        primary.config_set("maxmemory", 1)
        try:
            yield
        finally:
            primary.config_set("maxmemory", 0)


async def test_a_full_server_refuses_what_is_published_and_lets_its_workers_drain_it(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """P2 C1: else nothing would ever make room."""
    topic = await declare(settings, "g")
    await publish(settings, topic, "first")
    async with open_publisher(settings) as publisher, open_subscription(settings, topic, "g", LEASE) as member:
        held = await take(member, 1)
        await publisher.send([message(topic, f"{number}") for number in range(500)], deadline=soon())
        with full(servers):
            (refused,) = await publisher.send([message(topic, "too much")], deadline=soon())
            assert isinstance(refused, Rejection)
            assert refused.reason is RejectionReason.STORAGE_FULL
            assert not await member.settle([Ack(one) for one in held])
            assert not await member.settle([Ack(one) for one in await take(member, 500)])
            assert pending(servers, topic) == 0


# --- what got lost ------------------------------------------------------------------------------------------------


async def test_entries_whose_answer_got_lost_come_in_their_turn(servers: RedisServers, settings: RedisSettings) -> None:
    """C1 C3: the server has given them out, and the member has never heard of them."""
    topic = await declare(settings, "g")
    async with open_subscription(settings, topic, "g", LEASE) as member:
        await publish(settings, topic, "0")
        taken = await take(member, 1)
        keys = LaneKeys(topic, 0, "g")
        with servers.client(servers.primary) as primary:
            token = primary.hget(keys.state, "token")
            async with open_publisher(settings) as publisher:
                await publisher.send([message(topic, f"{number}") for number in range(1, 30)], deadline=soon())
            fetch = script("fetch")
            primary.eval(
                fetch.text,
                4,
                *(keys.stream, keys.state, keys.delayed, keys.waiting),
                *("g", token, 30_000, ">", 20),
            )
        await member.settle([Ack(one) for one in taken])
        while len(taken) < 30:
            came = await take(member, 1)
            await member.settle([Ack(one) for one in came])
            taken += came

    assert [one.message.body for one in taken] == [b"%d" % number for number in range(30)]
    assert pending(servers, topic) == 0


async def test_what_was_once_said_to_be_lost_does_not_come_back_by_a_late_answer(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """C2 C3: a server that stands still for longer than a lease and goes on.  Whoever works dropped the first message
    of the key, because the lane may be another member's; the second must not start before it.
    """
    topic = await declare(settings, "g")
    await publish(settings, topic, "0", "1", "2")
    async with open_subscription(settings, topic, "g", timedelta(seconds=SHORTEST_LEASE_SECONDS)) as member:
        first, second, third = await take(member, 3)
        await anyio.sleep(0.1)
        servers.primary.pause()
        try:
            while await member.extend([first, second, third]):
                await anyio.sleep(0.05)
            servers.primary.resume()  # and what was asked is answered: the lane has never been another's
            for _ in range(500):
                await anyio.sleep(0.001)
                assert not member.may_start(second)
                assert not await member.extend([second, third])
        finally:
            servers.primary.resume()

        again: list[bytes] = []
        while len(again) < 3:
            came = await take(member, 1)
            await member.settle([Ack(one) for one in came])
            again += [one.message.body for one in came]
        assert again == [b"0", b"1", b"2"]


async def test_tokens_grow_also_where_a_failover_forgot_the_last_ones(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """C12: else whoever still has an old one could write with it."""
    topic = await declare(settings, "g")
    keys, tokens = LaneKeys(topic, 0, "g"), list[int]()
    with servers.client(servers.primary) as primary:
        for _ in range(3):
            async with open_subscription(settings, topic, "g", LEASE) as member:
                await publish(settings, topic, "one")
                await member.settle([Ack(one) for one in await take(member, 1)])
                tokens.append(int(primary.hget(keys.state, "token") or 0))
            primary.delete(keys.state)

    assert tokens == sorted(set(tokens))


async def test_all_groups_of_a_topic_are_made_again_after_everything_was_flushed(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """S1 C9: also one whose workers are not there, or what is published next would pass it by."""
    topic = await declare(settings, "g", "away")
    async with open_subscription(settings, topic, "g", LEASE) as member:
        await publish(settings, topic, "before")
        await member.settle([Ack(one) for one in await take(member, 1)])
        with servers.client(servers.primary) as primary:
            primary.flushall()
            with anyio.fail_after(30):
                while not primary.exists(stream_of(topic, 0)):
                    await member.receive(1, max_bytes=1 << 20, wait=timedelta(seconds=0.1))
        await publish(settings, topic, "after")
        assert [one.message.body for one in await take(member, 1)] == [b"after"]
    async with open_subscription(settings, topic, "away", LEASE) as other:
        assert [one.message.body for one in await take(other, 1)] == [b"after"]


# --- what is another's --------------------------------------------------------------------------------------------


async def test_nothing_starts_on_a_lane_that_somebody_else_has_by_now(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """C12: the start is refused, and the new owner knows nothing of it."""
    topic = await declare(settings, "g")
    await publish(settings, topic, "contested")
    async with lost_lane(servers, settings, topic) as (member, delivery):
        assert not await member.begin([delivery])
    (again,) = await one_of(settings, topic)
    assert again.message.body == b"contested"
    assert again.crashes == 0


@asynccontextmanager
async def lost_lane(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> AsyncIterator[tuple[RedisSubscription, Delivery]]:
    async with open_subscription(settings, topic, "g", LEASE) as member:
        (delivery,) = await take(member, 1)
        with servers.client(servers.primary) as primary:
            primary.hincrby(LaneKeys(topic, 0, "g").state, "token", 1)  # as whoever takes it does
        yield member, delivery


async def one_of(settings: RedisSettings, topic: str) -> list[Delivery]:
    async with open_subscription(settings, topic, "g", LEASE) as member:
        return await take(member, 1, limit=1)


# --- what is large ------------------------------------------------------------------------------------------------


async def test_what_is_fetched_ahead_is_bounded_in_bytes(servers: RedisServers, settings: RedisSettings) -> None:
    """C10: a lane of large messages does not fill its worker's memory."""
    topic, size = await declare(settings, "g"), 500_000
    async with open_publisher(settings) as publisher, open_subscription(settings, topic, "g", LEASE) as member:
        for number in range(6):
            large = [message(topic, f"{number} {each}".ljust(size), None) for each in range(20)]
            assert all(isinstance(one, Confirmation) for one in await publisher.send(large, deadline=soon()))
        held = await take(member, 1, limit=1)
        await anyio.sleep(1)
        assert pending(servers, topic) <= ROOM_BYTES // size + 20
        while len(held) < 120:
            came = await take(member, 1, limit=10)
            await member.settle([Ack(one) for one in came])
            held += came
        await member.settle([Ack(held[0])])
    assert pending(servers, topic) == 0


async def test_a_message_that_cannot_be_written_again_waits_in_its_lane(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """C6: of more fields than a script can pass on."""
    topic = await declare(settings, "g")
    large = message(topic, "large", headers={f"header-{number}": "x" for number in range(3_455)})
    async with open_publisher(settings) as publisher:
        assert isinstance((await publisher.send([large], deadline=soon()))[0], Confirmation)
    async with open_subscription(settings, topic, "g", LEASE) as member:
        (delivery,) = await take(member, 1)
        assert not await member.settle([Retry(delivery, timedelta(minutes=5), keep_order=False)])
        assert pending(servers, topic) == 1
    with servers.client(servers.primary) as primary:
        primary.delete(LaneKeys(topic, 0, "g").attempts)  # so that it need not be waited for
    assert bodies(await drain(settings, topic, 1)) == {b"large": 1}
