"""Safe departure on real servers: P1 to P6."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from reliamq.spi import Confirmation, Durability, InDoubt, Rejection, RejectionReason
from reliamq_redis.catalog.names import stream_of
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings
from reliamq_redis.storage.storage import open_storage
from tests.redis.steps import bodies, declare, drain, message, outcome_of, outcomes_of, publishing, soon
from tests.servers.proxy import Proxy
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


@pytest.fixture
def proxy(servers: RedisServers) -> Iterator[Proxy]:
    """In front of the pair's primary."""
    ports = servers.ports[servers.primary]
    with Proxy(ports.proxied, ports.plain) as proxy:
        yield proxy


# --- how safe it is -----------------------------------------------------------------------------------------------


async def test_what_the_replica_does_not_have_is_not_confirmed_and_says_what_was_reached(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """P1: and it is stored once, however often it was waited for."""
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "before")], deadline=soon())
        servers.replica.pause()
        try:
            (outcome,) = await publisher.send([message(topic, "during")], deadline=soon(3))
            assert isinstance(outcome, InDoubt)
            assert "0 of 1 replicas" in outcome.detail
        finally:
            servers.replica.resume()
        (after,) = await publisher.send([message(topic, "after")], deadline=soon())
        assert isinstance(after, Confirmation)

    assert bodies(await drain(settings, topic, 3)) == {b"before": 1, b"during": 1, b"after": 1}


async def test_a_replica_that_comes_back_in_time_confirms_without_a_repetition(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """P1"""
    servers.replica.pause()
    try:
        async with publishing(settings) as publisher:
            waiting = asyncio.create_task(outcomes_of(publisher, [message(topic, f"{n}") for n in range(20)]))
            await asyncio.sleep(7)  # longer than one answer may take
            servers.replica.resume()
            assert set(await waiting) == {"confirmed"}
    finally:
        servers.replica.resume()

    assert len(await drain(settings, topic, 20)) == 20


async def test_a_topic_that_asks_for_one_disk_does_not_wait_for_a_replica(
    servers: RedisServers, settings: RedisSettings
) -> None:
    topic = await declare(settings, "g", durability=Durability.FSYNCED)
    servers.replica.pause()
    try:
        async with publishing(settings) as publisher:
            assert await outcome_of(publisher, message(topic, "one"), timedelta(seconds=5)) == "confirmed"
    finally:
        servers.replica.resume()


async def test_all_that_was_confirmed_is_there_after_the_primary_was_killed(
    whole: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """P1"""
    await confirm_and_kill(whole, settings, topic, count=2_000)


async def confirm_and_kill(servers: RedisServers, settings: RedisSettings, topic: str, *, count: int) -> None:
    """Kill the primary and its replica the moment that so many are confirmed."""
    async with publishing(settings) as publisher:
        messages = [message(topic, f"{number}", f"key {number % 50}") for number in range(count)]
        assert set(await outcomes_of(publisher, messages)) == {"confirmed"}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: server.kill(), [servers.primary, servers.replica]))
    servers.start()
    assert set(bodies(await drain(settings, topic, count))) == {f"{number}".encode() for number in range(count)}


# --- what is refused ----------------------------------------------------------------------------------------------


async def test_each_of_a_thousand_callers_gets_its_own_outcome(settings: RedisSettings, topic: str) -> None:
    """P2 P3: every third goes nowhere, and several share an id."""
    nowhere = await declare(settings)
    messages = [message(nowhere if n % 3 == 0 else topic, f"{n}", f"key {n}", id=f"id {n // 7}") for n in range(1000)]
    async with publishing(settings) as publisher:
        outcomes = await outcomes_of(publisher, messages)

    assert outcomes == ["Unroutable" if n % 3 == 0 else "confirmed" for n in range(1000)]
    assert len(await drain(settings, topic, 666)) == 666


async def test_a_full_server_rejects_and_takes_again_when_it_has_room(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    with servers.client(servers.primary) as primary:
        primary.config_set("maxmemory", "1mb")
        try:
            async with open_publisher(settings) as publisher:
                (outcome,) = await publisher.send([message(topic, "x")], deadline=soon(3))
                assert isinstance(outcome, Rejection)
                assert outcome.reason is RejectionReason.STORAGE_FULL
                primary.config_set("maxmemory", "0")
                (outcome,) = await publisher.send([message(topic, "x")], deadline=soon())
                assert isinstance(outcome, Confirmation)
        finally:
            primary.config_set("maxmemory", "0")


async def test_a_replica_rejects_and_stores_nothing(servers: RedisServers, settings: RedisSettings, topic: str) -> None:
    """P2: certainly not stored."""
    port = servers.ports[servers.replica].plain
    async with open_publisher(settings.model_copy(update={"servers": (f"127.0.0.1:{port}",)})) as publisher:
        (outcome,) = await publisher.send([message(topic, "x")], deadline=soon(3))

    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.UNAVAILABLE


async def test_too_few_replicas_for_the_server_are_a_rejection(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """P2: ``min-replicas-to-write`` refuses before anything is written."""
    with servers.client(servers.primary) as primary:
        primary.config_set("min-replicas-to-write", "2")
        try:
            async with open_publisher(settings) as publisher:
                (outcome,) = await publisher.send([message(topic, "x")], deadline=soon(3))
        finally:
            primary.config_set("min-replicas-to-write", "0")

    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.UNAVAILABLE
    assert not await drain(settings, topic, 0)


async def test_a_stream_that_is_gone_is_not_made_by_publishing(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """P3: nobody would receive what is in a stream without groups."""
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "before")], deadline=soon())
        with servers.client(servers.primary) as primary:
            streams = [stream_of(topic, lane) for lane in range(settings.lanes)]
            primary.delete(*streams)
            (outcome,) = await publisher.send([message(topic, "after")], deadline=soon())
            assert primary.exists(*streams) == 0

    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.UNROUTABLE


@pytest.mark.parametrize(
    ("name", "value"), [("surrogate", "\ud800"), ("many", "")], ids=["no UTF-8", "too many headers"]
)
async def test_what_redis_cannot_hold_is_invalid_and_its_neighbours_are_stored(
    settings: RedisSettings, topic: str, name: str, value: str
) -> None:
    """P2 P6"""
    headers = {name: value} if value else {f"{name} {number}": "" for number in range(5_000)}
    async with open_publisher(settings) as publisher:
        wrong = message(topic, "wrong", headers=headers)
        good, bad, also = await publisher.send([message(topic, "good"), wrong, message(topic, "also")], deadline=soon())

    assert isinstance(bad, Rejection)
    assert bad.reason is RejectionReason.INVALID
    assert [type(one) for one in (good, also)] == [Confirmation] * 2


async def test_a_limit_that_is_raised_is_known_to_who_publishes_already(settings: RedisSettings, topic: str) -> None:
    """P6: the topic's own limit counts, as it is now."""
    async with open_publisher(settings) as publisher:
        large = message(topic, "x" * 2_000_000)
        (outcome,) = await publisher.send([large], deadline=soon())
        assert isinstance(outcome, Rejection)
        assert outcome.reason is RejectionReason.TOO_LARGE


# --- answers that are lost ----------------------------------------------------------------------------------------


async def test_a_lost_answer_is_doubt_and_nothing_is_run_twice(
    proxied: RedisSettings, settings: RedisSettings, proxy: Proxy, topic: str
) -> None:
    """P4: redis-py would run it again by itself, up to ten times."""
    one = message(topic, "one")
    async with open_publisher(proxied) as publisher:
        await publisher.send([message(topic, "before")], deadline=soon())
        proxy.drop("down")
        (outcome,) = await publisher.send([one], deadline=soon(4))
        assert isinstance(outcome, InDoubt)
        proxy.heal()
        (again,) = await publisher.send([one], deadline=soon())
        assert isinstance(again, Confirmation)

    stored = await drain(settings, topic, 3)
    assert bodies(stored) == {b"before": 1, b"one": 2}
    assert len({each.id for each in stored}) == 2


async def test_a_server_that_forgets_its_scripts_is_told_them_again(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "before")], deadline=soon())
        with servers.client(servers.primary) as primary:
            primary.script_flush()
        batch = [message(topic, f"{number}", f"key {number}") for number in range(20)]
        assert {type(one) for one in await publisher.send(batch, deadline=soon())} == {Confirmation}

    assert len(await drain(settings, topic, 21)) == 21


@pytest.mark.parametrize("how", ["closed", "half a frame", "blackholed", "answers lost"])
async def test_five_hundred_callers_have_outcomes_in_time_when_the_connection_breaks_and_repeating_stores_all(
    settings: RedisSettings, proxied: RedisSettings, proxy: Proxy, topic: str, how: str
) -> None:
    """P2 P4"""
    messages = [message(topic, f"{number}", f"key {number % 20}") for number in range(500)]
    async with publishing(proxied) as publisher:
        await outcome_of(publisher, message(topic, "first"))
        calls = asyncio.create_task(outcomes_of(publisher, messages, timedelta(seconds=3)))
        await asyncio.sleep(0.01)
        break_connections(proxy, how)
        outcomes = await asyncio.wait_for(calls, 5)
        assert set(outcomes) <= {"confirmed", "Unconfirmed", "Rejected"}

        proxy.heal()
        open_ones = [one for one, outcome in zip(messages, outcomes, strict=True) if outcome != "confirmed"]
        assert set(await outcomes_of(publisher, open_ones)) <= {"confirmed"}

    stored = await drain(settings, topic, 501)
    assert set(bodies(stored)) == {b"first", *(f"{number}".encode() for number in range(500))}


def break_connections(proxy: Proxy, how: str) -> None:
    match how:
        case "closed":
            proxy.cut()
        case "half a frame":
            proxy.cut_after(5)
        case "blackholed":
            proxy.blackhole()
        case "answers lost":
            proxy.drop("down")


async def test_keys_stay_in_order_while_connections_are_cut_again_and_again(
    settings: RedisSettings, proxied: RedisSettings, proxy: Proxy, topic: str
) -> None:
    """P5"""
    async with publishing(proxied) as publisher:
        for wave in range(25):
            if wave % 3 == 1:
                proxy.cut_after(7 * wave % 60)
            batch = [message(topic, f"{wave:02}-{each}", f"key {each}") for each in range(8)]
            assert set(await outcomes_of(publisher, batch)) == {"confirmed"}

    stored = await drain(settings, topic, 200)
    for each in range(8):
        came = [one.body for one in stored if one.key == f"key {each}".encode()]
        assert list(dict.fromkeys(came)) == [f"{wave:02}-{each}".encode() for wave in range(25)]


async def test_declaring_less_lanes_later_keeps_those_that_are_there(settings: RedisSettings, topic: str) -> None:
    """S1"""
    fewer = settings.model_copy(update={"lanes": 1})
    again = await declare_again(fewer, topic)
    assert [one.setting for one in again] == ["lanes"]
    async with open_publisher(fewer) as publisher:
        batch = [message(topic, f"{number}", f"key {number}") for number in range(40)]
        assert {type(one) for one in await publisher.send(batch, deadline=soon())} == {Confirmation}
    assert len(await drain(settings, topic, 40)) == 40


async def declare_again(settings: RedisSettings, topic: str) -> list[object]:
    from reliamq.spi import GroupSpec, TopicSpec

    async with open_storage(settings) as storage:
        return list(await storage.declare([TopicSpec(topic, (GroupSpec("g"),))]))
