"""Late retries on real servers: what gives way for long is outside its lane meanwhile (C1, C4, C6)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from redis import Redis

from reliamq import Delivery as HandlersDelivery, RetryAfter
from reliamq.spi import Ack, BrokerUnavailable, Confirmation, Delivery, Message, Retry, Subscription
from reliamq_redis.catalog.names import LaneKeys
from reliamq_redis.consuming.subscription import open_subscription
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings
from tests.brokers.application import Order, eventually, make_app, publish, working
from tests.brokers.conftest import on_redis
from tests.redis.steps import LEASE, declare, drain, message, soon
from tests.servers.proxy import Proxy
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
MINUTE, DAYS = timedelta(minutes=1), timedelta(days=3)
BUSY = timedelta(seconds=3)
"""A lease that has the lane looked at every second."""


@pytest.fixture
def settings(settings: RedisSettings) -> RedisSettings:
    """One lane, so that what is in it is seen."""
    return settings.model_copy(update={"lanes": 1})


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gives way for more than half a second goes away."""
    monkeypatch.setattr("reliamq_redis.consuming.subscription.LONG", timedelta(seconds=0.5))


@dataclass
class Place:
    """The one lane of a topic, for the group ``g``, as the server has it."""

    primary: Redis
    keys: LaneKeys

    def pending(self) -> int:
        return int(self.primary.xpending(self.keys.stream, "g")["pending"])

    def away(self) -> dict[bytes, float]:
        """Entries by when they are due, in seconds from now; each is kept once."""
        seconds, microseconds = self.primary.time()
        now = seconds + microseconds / 1e6
        found = {
            name: score / 1000 - now for name, score in self.primary.zrange(self.keys.delayed, 0, -1, withscores=True)
        }
        assert set(self.primary.hkeys(self.keys.waiting)) == set(found)
        return found

    def bring_forward(self) -> None:
        """As when all of them have waited long enough."""
        for name in self.away():
            self.primary.zadd(self.keys.delayed, {name: 1})


@pytest.fixture
def place(servers: RedisServers, topic: str) -> Iterator[Place]:
    with servers.client(servers.primary) as primary:
        yield Place(primary, LaneKeys(topic, 0, "g"))


async def send(settings: RedisSettings, *messages: Message) -> None:
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send(messages, deadline=soon())
    assert {type(one) for one in outcomes} == {Confirmation}


async def take(member: Subscription, count: int) -> Sequence[Delivery]:
    taken: list[Delivery] = []
    with anyio.fail_after(60):
        while len(taken) < count:
            try:
                taken += await member.receive(count - len(taken), max_bytes=1 << 30, wait=timedelta(seconds=5))
            except BrokerUnavailable:  # just started again; whoever receives asks again
                await anyio.sleep(0.2)
    return taken


async def put_away(member: Subscription, deliveries: Sequence[Delivery], delay: timedelta = MINUTE) -> None:
    assert not await member.settle([Retry(one, delay, keep_order=False) for one in deliveries])


def texts(deliveries: Sequence[Delivery]) -> list[str]:
    return [one.message.body.decode() for one in deliveries]


# --- what is away -------------------------------------------------------------------------------------------------


async def test_what_gives_way_for_long_leaves_its_lane_and_comes_back_with_its_attempts(
    servers: RedisServers, tmp_path: Path, short: None
) -> None:
    """C4 C6"""
    app, attempts = make_app(on_redis(servers), tmp_path, shares=1), list[tuple[int, int]]()
    orders = app.topic(f"delays-{time.time_ns()}", Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order, delivery: HandlersDelivery) -> None:
        attempts.append((order.number, delivery.attempt))
        if order.number == 0 and delivery.attempt <= 2:
            raise RetryAfter(timedelta(seconds=2), reason="not yet", keep_order=False)

    async with app:
        async with working(app):
            began = time.monotonic()
            await publish(app, orders.name, range(3), accounts=1)
            await eventually(lambda: len(attempts) == 3)
        async with working(app):  # nobody worked meanwhile
            await eventually(lambda: len(attempts) == 5)
            assert time.monotonic() - began >= 4

    assert attempts == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3)]


async def test_what_is_away_holds_no_room_in_its_lane(settings: RedisSettings, topic: str, place: Place) -> None:
    """C6 C10"""
    await send(settings, *[message(topic, f"{number}") for number in range(30)])
    small = settings.model_copy(update={"prefetch": 10})
    async with open_subscription(small, topic, "g", LEASE) as member:
        for first in (0, 10, 20):
            came = await take(member, 10)
            assert texts(came) == [f"{number}" for number in range(first, first + 10)]
            await put_away(member, came)
        assert place.pending() == 0
        assert len(place.away()) == 30
        assert not place.primary.exists(place.keys.attempts)


async def test_nothing_comes_back_before_its_time_and_then_it_does(
    settings: RedisSettings, topic: str, place: Place
) -> None:
    """C6: the time is the server's."""
    await send(settings, message(topic, "one"))
    async with open_subscription(settings, topic, "g", LEASE) as member:
        await put_away(member, await take(member, 1), timedelta(seconds=31))
        (left,) = place.away().values()
        assert 29 < left <= 31
        assert not await member.receive(1, max_bytes=1, wait=timedelta(seconds=2))
        place.bring_forward()
        (again,) = await take(member, 1)
        assert (again.failures, again.crashes, again.message.body) == (1, 0, b"one")
        await member.settle([Ack(again)])
    assert not place.away()
    assert place.pending() == 0


async def test_long_waits_do_not_wait_for_one_another(
    settings: RedisSettings, topic: str, place: Place, short: None
) -> None:
    """C6: nor for one of days."""
    waits = {"days": DAYS, "minute": MINUTE, "4": timedelta(seconds=4), "2.5": timedelta(seconds=2.5)}
    await send(settings, *[message(topic, text) for text in waits])
    came: list[tuple[str, float]] = []
    async with open_subscription(settings, topic, "g", BUSY) as member:
        held, began = await take(member, len(waits)), time.monotonic()
        assert not await member.settle(
            [Retry(one, waits[text], keep_order=False) for one, text in zip(held, waits, strict=True)]
        )
        while len(came) < 2:
            for one in await member.receive(10, max_bytes=1 << 20, wait=timedelta(seconds=20)):
                came.append((one.message.body.decode(), time.monotonic() - began))
                await member.settle([Ack(one)])
    assert [text for text, _ in came] == ["2.5", "4"]
    assert all(float(text) <= waited < float(text) + 2 for text, waited in came), came
    assert sorted(place.away().values()) == pytest.approx([60, DAYS.total_seconds()], abs=30)


async def test_what_is_short_or_keeps_its_order_stays_in_its_lane(
    settings: RedisSettings, topic: str, place: Place
) -> None:
    """C3 C6: what comes after it of its key waits."""
    await send(settings, message(topic, "keeps"), message(topic, "short", "another key"), message(topic, "behind"))
    async with open_subscription(settings, topic, "g", LEASE) as member:
        keeps, short, behind = await take(member, 3)
        await member.settle([Retry(keeps, MINUTE), Retry(short, timedelta(seconds=30), keep_order=False)])
        assert list(await member.settle([Ack(behind)])) == [Ack(behind)], "it was taken back, because its key waits"
        assert not place.away()
        assert place.pending() == 3


async def test_a_lane_with_a_long_lease_brings_back_what_is_due_all_the_same(
    settings: RedisSettings, topic: str, short: None
) -> None:
    """C6: it looks more often than it must renew."""
    patient = settings.model_copy(update={"member_timeout_seconds": 600.0})
    await send(settings, message(topic, "one"))
    async with open_subscription(patient, topic, "g", timedelta(minutes=10)) as member:
        held, began = await take(member, 1), time.monotonic()
        await put_away(member, held, timedelta(seconds=4))
        await take(member, 1)
        assert 4 <= time.monotonic() - began < 9


# --- what comes back ----------------------------------------------------------------------------------------------


async def test_bytes_and_all_that_belongs_to_them_come_back_unchanged_however_often(
    settings: RedisSettings, topic: str, place: Place
) -> None:
    """C4 C6"""
    headers = {"ü": "☃\x00\n", "": "", "header-x": "1", "reliamq-attempts": "9,9,9,9,9,9", "colour": "red"}
    originals = [
        replace(message(topic, "", headers=headers, sequence=7), key=b"\xff\x00k", body=bytes(range(256)) * 3_000),
        replace(message(topic, "", key=None, content_type="application/octet-stream"), body=b""),
        replace(message(topic, "", headers={f"header {number}": "ä" for number in range(3_400)}), key=b""),
        replace(message(topic, "for g"), only_group="g"),
    ]
    await send(settings, *originals)
    async with open_subscription(settings, topic, "g", BUSY) as member:
        for failures in range(4):
            came = {one.message.id: one for one in await take(member, 4)}
            for original in originals:
                one = came[original.id]
                assert replace(one.message, headers={}) == replace(original, headers={})
                assert dict(one.message.headers) == dict(original.headers)
                assert (one.failures, one.crashes) == (failures, 0)
            await put_away(member, list(came.values()))
            place.bring_forward()


async def test_attempts_are_kept_and_what_does_not_count_is_not_counted(
    settings: RedisSettings, topic: str, place: Place
) -> None:
    """C4: also those that ended with a process."""
    await send(settings, message(topic, "one"))
    async with open_subscription(settings, topic, "g", LEASE) as member:
        await take(member, 1)
    entry = place.primary.xpending_range(place.keys.stream, "g", "-", "+", 1)[0]["message_id"]
    place.primary.hset(place.keys.attempts, entry, "1,1,1,0,0,1")  # somebody had begun,
    place.primary.hset(place.keys.state, mapping={"member": "somebody", "until": 1})  # and is dead
    async with open_subscription(settings, topic, "g", BUSY) as member:
        for counts, attempts in ((True, (1, 2)), (False, (2, 2)), (True, (2, 2))):
            (one,) = await take(member, 1)
            assert (one.failures, one.crashes) == attempts
            assert not await member.settle([Retry(one, MINUTE, keep_order=False, counts=counts)])
            assert not place.primary.exists(place.keys.attempts)
            place.bring_forward()
        (one,) = await take(member, 1)
        await member.begin([one])
    assert place.primary.hvals(place.keys.attempts) == [b"3,2,0,1,0,0"], "the start was given back"


async def test_it_comes_back_to_its_own_group_alone(
    servers: RedisServers, settings: RedisSettings, short: None
) -> None:
    """C6 C9"""
    topic = await declare(settings, "g", "h")
    await send(settings, message(topic, "one"), message(topic, "two"))
    async with open_subscription(settings, topic, "g", BUSY) as g, open_subscription(settings, topic, "h", BUSY) as h:
        await h.settle([Ack(one) for one in await take(h, 2)])
        await put_away(g, await take(g, 2), timedelta(seconds=1))
        await g.settle([Ack(one) for one in await take(g, 2)])
        assert not await h.receive(1, max_bytes=1, wait=timedelta(seconds=2))
        with servers.client(servers.primary) as primary:
            for group in ("g", "h"):
                keys = LaneKeys(topic, 0, group)
                assert primary.xlen(keys.stream) == 4
                assert primary.xpending(keys.stream, group)["pending"] == 0
                assert primary.exists(keys.attempts, keys.delayed, keys.waiting) == 0


async def test_what_is_trimmed_meanwhile_comes_back(
    servers: RedisServers, settings: RedisSettings, short: None
) -> None:
    """C6 C9: retention does not reach it."""
    settings = settings.model_copy(update={"trim_interval_seconds": 0.2})
    topic = await declare(settings, "g", retention=timedelta(0))
    await send(settings, *[message(topic, f"{number}", f"{number}") for number in range(300)])
    async with open_subscription(settings, topic, "g", BUSY) as member:
        await put_away(member, await take(member, 300), timedelta(seconds=4))
        with servers.client(servers.primary) as primary:
            with anyio.fail_after(4):
                while primary.xlen(LaneKeys(topic, 0, "g").stream) > 200:
                    await member.receive(1, max_bytes=1, wait=timedelta(seconds=0.2))
        assert sorted(texts(await take(member, 300)), key=int) == [f"{number}" for number in range(300)]


async def test_two_thousand_at_once_come_back_once_each(
    settings: RedisSettings, topic: str, place: Place, short: None
) -> None:
    """C6: a hundred at a time, without a pause between."""
    await send(settings, *[message(topic, f"{number}", f"key {number % 7}") for number in range(2_000)])
    many = settings.model_copy(update={"prefetch": 2_000})
    async with open_subscription(many, topic, "g", LEASE) as member:
        await put_away(member, await take(member, 2_000), timedelta(seconds=3))
        assert len(place.away()) == 2_000
        began = time.monotonic()
        came = await take(member, 2_000)
        assert time.monotonic() - began < 15
        assert Counter(texts(came)) == Counter(f"{number}" for number in range(2_000))
        assert {one.failures for one in came} == {1}
        await member.settle([Ack(one) for one in came])
    assert not place.away()
    assert place.pending() == 0


# --- what happens meanwhile ---------------------------------------------------------------------------------------


async def test_it_survives_the_death_of_the_primary_and_its_members_closing(
    whole: RedisServers, settings: RedisSettings, topic: str, place: Place, short: None
) -> None:
    """C6: it is on the disk with its acknowledgement."""
    await send(settings, *[message(topic, f"{number}", f"{number}") for number in range(50)])
    async with open_subscription(settings, topic, "g", LEASE) as member:
        early = await take(member, 25)
        await put_away(member, early, timedelta(seconds=6))
        began = time.monotonic()
        rest = await take(member, 25)
        await anyio.to_thread.run_sync(whole.primary.kill)
        await anyio.to_thread.run_sync(whole.start)
    assert len(place.away()) == 25
    async with open_subscription(settings, topic, "g", LEASE) as member:
        first = await take(member, 25)
        assert sorted(texts(first)) == sorted(texts(rest))
        await member.settle([Ack(one) for one in first])
    async with open_subscription(settings, topic, "g", LEASE) as member:
        second = await take(member, 25)
        assert time.monotonic() - began >= 6
        assert sorted(texts(second)) == sorted(texts(early))
        assert {(one.failures, one.crashes) for one in second} == {(1, 0)}


@pytest.fixture
def proxy(servers: RedisServers) -> Iterator[Proxy]:
    """In front of the pair's primary."""
    ports = servers.ports[servers.primary]
    with Proxy(ports.proxied, ports.plain) as proxy:
        yield proxy


@pytest.mark.parametrize("lost", ["the answer", "the command"])
async def test_a_write_that_was_lost_puts_nothing_away_twice_and_loses_nothing(
    settings: RedisSettings, proxied: RedisSettings, proxy: Proxy, topic: str, place: Place, lost: str
) -> None:
    """C1 C6"""
    await send(settings, *[message(topic, f"{number}", f"{number}") for number in range(40)])
    async with open_subscription(proxied, topic, "g", LEASE) as member:
        held = await take(member, 40)
        await anyio.sleep(1.5)  # by then it has a connection that nobody uses
        if lost == "the answer":
            proxy.drop("down")
        else:
            proxy.blackhole()
        retries = [Retry(one, MINUTE, keep_order=False) for one in held]
        with pytest.raises(BrokerUnavailable):
            await member.settle(retries)
        assert len(place.away()) == (40 if lost == "the answer" else 0)
        proxy.heal()
        with anyio.fail_after(30):
            while True:  # the core settles until it can
                with suppress(BrokerUnavailable):
                    await member.settle(retries)
                    break
        if lost == "the command":
            again = await take(member, 40 - len(place.away()))
            await put_away(member, again)
        assert len(place.away()) == 40
        assert place.pending() == 0
        place.bring_forward()
        came = await take(member, 40)
        assert Counter(texts(came)) == Counter(f"{number}" for number in range(40))
        assert {one.failures for one in came} == {1}
        await member.settle([Ack(one) for one in came])
    assert not await drain(settings, topic, 0)


async def test_whoever_lost_the_lane_puts_nothing_away(settings: RedisSettings, topic: str, place: Place) -> None:
    """C12: else it would come to the new owner twice."""
    await send(settings, message(topic, "contested"))
    async with open_subscription(settings, topic, "g", LEASE) as late:
        (stale,) = await take(late, 1)
        place.primary.hincrby(place.keys.state, "token", 1)  # as whoever takes it does
        retry = Retry(stale, MINUTE, keep_order=False)
        assert list(await late.settle([retry])) == [retry]
        assert not place.away()
