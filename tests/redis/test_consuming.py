"""Safe arrival on real servers: what only Redis can do to a member (C1, C2, C9, C11)."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from reliamq.spi import Ack, Delivery
from reliamq_redis.catalog.names import LaneKeys, stream_of
from reliamq_redis.consuming.subscription import open_subscription
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import RedisSettings
from tests.brokers.application import Order, Service, eventually, make_app, publish, wait_until, working
from tests.brokers.conftest import on_redis
from tests.redis.steps import LEASE, bodies, declare, drain, message, outcomes_of, publishing, soon
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# --- what vanished ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["everything", "a stream", "a group"])
async def test_what_vanishes_under_a_worker_is_told_and_made_again_and_work_goes_on(
    servers: RedisServers, tmp_path: Path, topic: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S1 C9: from the beginning of what is there, never from its end."""
    app = make_app(on_redis(servers), tmp_path, shares=1)
    runs, group = Counter[int](), "g"
    orders = app.topic(topic + what[-1], Order, key=lambda order: order.account)

    @app.handler(orders, group=group, effects="repeatable")
    async def handle(order: Order) -> None:
        runs[order.number] += 1

    async with app, working(app):
        await publish(app, orders.name, range(20), accounts=5)
        await eventually(lambda: len(runs) == 20)
        await anyio.sleep(0.3)
        with servers.client(servers.primary) as primary:
            match what:
                case "everything":
                    primary.flushall()
                case "a stream":
                    primary.delete(stream_of(orders.name, 0))
                case "a group":
                    primary.xgroup_destroy(stream_of(orders.name, 0), group)
        await eventually(lambda: any("replay the outbox" in one.message for one in caplog.records))
        await publish(app, orders.name, range(20, 40), accounts=5)
        await eventually(lambda: len(runs) == 40)

    assert any(one.levelno == logging.ERROR and "reliamq outbox replay" in one.message for one in caplog.records)


async def test_a_position_that_falls_back_is_told(
    servers: RedisServers, settings: RedisSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a failover to a replica that lacked what was confirmed."""
    settings = settings.model_copy(update={"lanes": 1})
    topic = await declare(settings, "g")
    async with open_publisher(settings) as publisher, open_subscription(settings, topic, "g", LEASE) as member:
        await publisher.send([message(topic, f"{number}") for number in range(5)], deadline=soon())
        taken: list[Delivery] = []
        while len(taken) < 5:
            taken += await member.receive(5, max_bytes=1 << 30, wait=timedelta(seconds=5))
        await member.settle([Ack(one) for one in taken])
        with servers.client(servers.primary) as primary:
            primary.xgroup_setid(stream_of(topic, 0), "g", "0-1")
        again = await member.receive(5, max_bytes=1 << 30, wait=timedelta(seconds=20))
        assert again, "what the group has by its position comes again"
    assert any("fell back" in one.message for one in caplog.records)


async def test_entries_that_somebody_removed_are_told_and_hold_nobody_up(
    servers: RedisServers, settings: RedisSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """C11: a pending entry that was trimmed comes back without fields."""
    settings = settings.model_copy(update={"lanes": 1})
    topic = await declare(settings, "g")
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, f"{number}") for number in range(4)], deadline=soon())
        async with open_subscription(settings, topic, "g", LEASE) as member:
            assert await member.receive(4, max_bytes=1 << 30, wait=timedelta(seconds=10))
        with servers.client(servers.primary) as primary:
            primary.xtrim(stream_of(topic, 0), maxlen=1, approximate=False)
        assert bodies(await drain(settings, topic, 1)) == {b"3": 1}
        assert sum("was removed" in one.message for one in caplog.records) == 3
        await publisher.send([message(topic, "next")], deadline=soon())
    assert bodies(await drain(settings, topic, 1)) == {b"next": 1}


async def test_what_nobody_of_ours_wrote_is_delivered_as_it_is(
    servers: RedisServers, settings: RedisSettings, topic: str
) -> None:
    """C11"""
    with servers.client(servers.primary) as primary:
        primary.xadd(stream_of(topic, 0), {"data": b"\xff", "colour": "red"})
        primary.xadd(stream_of(topic, 1), {b"\xfe": b"\xff"})
    stored = await drain(settings, topic, 2)

    assert bodies(stored) == {b"\xff": 1, b"": 1}
    assert {"data": "\\xff", "colour": "red"} in [dict(one.headers) for one in stored]


# --- who died -----------------------------------------------------------------------------------------------------


async def test_a_member_that_lost_its_lane_changes_nothing_in_it(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """C12: its token is another one by then."""
    settings = settings.model_copy(update={"lanes": 1})
    topic = await declare(settings, "g")
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "contested")], deadline=soon())
    async with open_subscription(settings, topic, "g", LEASE) as late:
        (stale,) = await late.receive(1, max_bytes=1 << 30, wait=timedelta(seconds=10))
        with servers.client(servers.primary) as primary:
            primary.hincrby(LaneKeys(topic, 0, "g").state, "token", 1)  # as whoever takes it does
        assert list(await late.settle([Ack(stale)])) == [Ack(stale)]
    assert bodies(await drain(settings, topic, 1)) == {b"contested": 1}


def test_a_handler_at_three_times_its_lease_runs_once_and_again_soon_after_its_worker_was_killed(
    servers: RedisServers, tmp_path: Path
) -> None:
    """C2 C7"""
    lease, service = 3, Service(on_redis(servers), tmp_path, f"test-{uuid.uuid4()}")
    service.publish({"number": 0, "account": "slow", "seconds": 1_000})
    with service.worker(RELIAMQ_WORKER__LEASE=f"{lease}s") as worker:
        wait_until(lambda: service.lines("started") == [0])
        with service.worker(RELIAMQ_WORKER__LEASE=f"{lease}s", SERVICE_HURRY="yes"):
            time.sleep(3 * lease)
            assert service.lines("started") == [0]
            worker.kill()
            killed_at = time.monotonic()
            wait_until(lambda: service.lines("done") == [0])
            assert time.monotonic() - killed_at < lease + 5

    assert service.lines("started") == [0, 0]


async def test_a_primary_that_is_killed_and_started_again_costs_no_effect(
    whole: RedisServers, tmp_path: Path, topic: str
) -> None:
    """P1 C1"""
    app = make_app(on_redis(whole), tmp_path, shares=4)
    runs = Counter[int]()
    orders = app.topic(topic, Order, key=lambda order: order.account)

    @app.handler(orders, group="g", effects="repeatable")
    async def handle(order: Order) -> None:
        runs[order.number] += 1

    async with app, working(app):
        for round_number in range(3):
            first = round_number * 300
            publishing_orders = asyncio.create_task(publish(app, topic, range(first, first + 300), accounts=20))
            await asyncio.sleep(0.05)
            await anyio.to_thread.run_sync(whole.primary.kill)
            await anyio.to_thread.run_sync(whole.start)
            await publishing_orders
        await eventually(lambda: len(runs) == 900)


# --- what is kept -------------------------------------------------------------------------------------------------


async def test_a_group_that_stands_still_keeps_its_entries_and_without_it_the_stream_stays_small(
    servers: RedisServers, settings: RedisSettings
) -> None:
    """C9"""
    settings = settings.model_copy(update={"lanes": 1, "trim_interval_seconds": 0.2})
    topic = await declare(settings, "g", "still", retention=timedelta(0))
    stream = stream_of(topic, 0)
    with servers.client(servers.primary) as primary:
        async with publishing(settings) as publisher, open_subscription(settings, topic, "g", LEASE) as member:

            async def flow(first: int) -> None:
                batch = [message(topic, f"{n}", f"{n}") for n in range(first, first + 1_000)]
                assert set(await outcomes_of(publisher, batch)) == {"confirmed"}
                left = 1_000
                while left:
                    came = await member.receive(500, max_bytes=1 << 30, wait=timedelta(seconds=10))
                    await member.settle([Ack(one) for one in came])
                    left -= len(came)

            await flow(0)
            await anyio.sleep(2.5)
            assert primary.xlen(stream) == 1_000, "the other group has not had them"
            assert len(await drain_group(settings, topic, "still", 1_000)) == 1_000
            for first in range(1_000, 6_000, 1_000):
                await flow(first)
                assert len(await drain_group(settings, topic, "still", 1_000)) == 1_000
            with anyio.fail_after(20):
                while primary.xlen(stream) > 200:
                    await member.receive(1, max_bytes=1, wait=timedelta(seconds=0.3))


async def drain_group(settings: RedisSettings, topic: str, group: str, count: int) -> list[bytes]:
    taken: list[bytes] = []
    async with open_subscription(settings, topic, group, LEASE) as member:
        while len(taken) < count:
            came = await member.receive(500, max_bytes=1 << 30, wait=timedelta(seconds=10))
            await member.settle([Ack(one) for one in came])
            taken += [one.message.body for one in came]
    return taken
