"""Attempts and delays: C4, C6."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from datetime import timedelta

from reliamq.spi import Ack, Retry
from reliamq.testing.harness import LEASE, Stage, bodies, promise

SHORT, SECONDS, LONG = timedelta(seconds=0.3), timedelta(seconds=2.2), timedelta(seconds=60)


@promise("C4")
async def test_failed_attempts_are_counted_over_members(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message())
    for failures in range(4):
        async with stage.member() as member:
            (delivery,) = await member.take(1)
            assert (delivery.failures, delivery.crashes, delivery.attempt) == (failures, 0, failures + 1)
            assert not delivery.redelivered
            await member.settle(Retry(delivery, timedelta(0)))


@promise("C4")
async def test_a_retry_that_does_not_count_leaves_the_attempts_as_they_are(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message())
    async with stage.member() as member:
        (delivery,) = await member.take(1)
        await member.settle(Retry(delivery, timedelta(0), counts=False))
        (again,) = await member.take(1)
        assert again.attempt == 1
        await member.settle(Ack(again))


@promise("C4")
async def test_only_a_recorded_start_that_nobody_settles_is_a_crash(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"started", key=b"a"), stage.message(b"held", key=b"b"))
    async with stage.abandoned_member(lease=LEASE) as dies, stage.member() as other:
        held = {one.message.body: one for one in await dies.take(2)}
        assert list(await dies.subscription.begin([held[b"started"]])) == [held[b"started"]]

        again = {one.message.body: one for one in await other.take(2)}

        assert (again[b"started"].crashes, again[b"started"].attempt) == (1, 2)
        assert (again[b"held"].crashes, again[b"held"].attempt) == (0, 1)
        await other.settle(*[Ack(delivery) for delivery in again.values()])


@promise("C4")
async def test_failures_and_crashes_go_on_being_counted_side_by_side(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(key=b"k"))
    async with AsyncExitStack() as dead:
        for count in range(4):
            dies = await dead.enter_async_context(stage.abandoned_member(lease=LEASE))
            (delivery,) = await dies.take(1)
            assert (delivery.failures, delivery.crashes) == (count, count)
            await dies.settle(Retry(delivery, timedelta(0)))
            (delivery,) = await dies.take(1)
            assert (delivery.failures, delivery.crashes) == (count + 1, count)
            assert list(await dies.subscription.begin([delivery])) == [delivery]

        async with stage.member() as member:
            (delivery,) = await member.handle(1)
        assert (delivery.failures, delivery.crashes, delivery.attempt) == (4, 4, 9)


@promise("C4")
async def test_a_late_start_is_not_granted_and_is_no_crash_of_the_new_owner(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message())
    async with (
        stage.abandoned_member(lease=LEASE) as late,
        stage.abandoned_member(lease=LEASE) as owner,
        stage.member() as other,
    ):
        (stale,) = await late.take(1)
        await owner.take(1)
        assert list(await late.subscription.begin([stale])) == []

        (again,) = await other.handle(1)
        assert (again.crashes, again.attempt) == (0, 1)


@promise("C6")
async def test_a_long_delay_holds_up_no_short_one(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"long", key=b"a"), stage.message(b"short", key=b"b"))
    async with stage.member() as member:
        for delivery in await member.take(2):
            await member.settle(Retry(delivery, LONG if delivery.message.body == b"long" else SHORT))
        await member.nothing_comes(during=SHORT / 3)

        assert bodies(await member.handle(1)) == [b"short"]
        await member.nothing_comes()


@promise("C6")
async def test_a_key_that_keeps_its_order_waits_for_its_message(stage: Stage) -> None:
    stage.require("waits_in_order")
    await stage.declare()
    await stage.publish(*stage.numbered(4, key=b"k"))
    async with stage.member() as member, stage.member() as other:
        first, *_ = await member.take(4)
        await member.settle(Retry(first, SHORT, keep_order=True))
        await other.nothing_comes(during=SHORT / 3)

        assert bodies(await other.handle(4)) == [b"0", b"1", b"2", b"3"]


@promise("C6")
async def test_a_key_keeps_its_order_for_seconds_too(stage: Stage) -> None:
    stage.require("waits_in_order")
    await stage.declare()
    await stage.publish(*stage.numbered(3, key=b"k"))
    async with stage.member() as member, stage.member() as other:
        first, *_ = await member.take(3)
        await member.settle(Retry(first, SECONDS, keep_order=True))
        await other.nothing_comes(during=SECONDS * 0.7)

        assert bodies(await other.handle(3)) == [b"0", b"1", b"2"]


@promise("C6")
async def test_a_message_that_gives_way_comes_back_behind_its_keys_others(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(3, key=b"k"))
    async with stage.member() as member:
        (first,) = await member.take(1, limit=1)
        await member.settle(Retry(first, SHORT, keep_order=False))

        assert bodies(await member.handle(3)) == [b"1", b"2", b"0"]


@promise("C6")
async def test_a_delay_survives_the_closing_of_everything(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"later", key=b"k"))
    async with stage.member() as member:
        (delivery,) = await member.take(1)
        await member.settle(Retry(delivery, 3 * SHORT))

    async with stage.member() as member:
        await member.nothing_comes(during=SHORT)
        assert bodies(await member.handle(1)) == [b"later"]


@promise("C6")
async def test_a_delay_of_seconds_is_kept_whole_also_when_everything_is_closed(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"later", key=b"k"))
    async with stage.member() as member:
        (delivery,) = await member.take(1)
        asked = time.monotonic()
        await member.settle(Retry(delivery, SECONDS))
        await member.nothing_comes(during=SHORT)

    async with stage.member() as member:
        await member.nothing_comes(during=SECONDS / 2)
        assert bodies(await member.handle(1)) == [b"later"]
    assert time.monotonic() - asked > SECONDS.total_seconds() - 0.1  # two clocks run a little apart
