"""Safe arrival: C1–C3, C7, C8, C10–C12."""

from __future__ import annotations

from datetime import timedelta

import anyio

from reliamq.spi import Ack, Release, Retry
from reliamq.testing.harness import LEASE, Member, Stage, bodies, promise

SOON = timedelta(seconds=0.01)


@promise("C1")
async def test_what_nobody_settled_is_delivered_again_by_a_new_member(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(3))
    async with stage.member() as member:
        assert len(await member.take(3)) == 3

    async with stage.member() as member:
        assert sorted(bodies(await member.handle(3))) == [b"0", b"1", b"2"]
        await member.nothing_comes()


@promise("C2")
async def test_what_a_silent_member_holds_is_redelivered_after_its_lease(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(3, key=b"k"))
    async with stage.abandoned_member(lease=LEASE) as silent, stage.member() as other:
        held = await silent.take(3)
        assert not any(delivery.redelivered for delivery in held)

        again = await other.take(3)

        assert bodies(again) == [b"0", b"1", b"2"]
        assert all(delivery.redelivered for delivery in again)
        await other.settle(*[Ack(delivery) for delivery in again])


@promise("C3")
async def test_a_key_is_never_at_two_members_and_stays_in_order(stage: Stage) -> None:
    await stage.declare()
    keys = [b"a", b"b", b"c", b"d"]
    await stage.publish(*[stage.message(b"%d" % number, key=keys[number % 4]) for number in range(120)])
    handled: list[tuple[bytes, int]] = []
    at_work: set[bytes] = set()

    async def work(limit: int) -> None:
        async with stage.member() as member:
            while len(handled) < 120:
                came = await member.receive(limit, wait=timedelta(seconds=0.1))
                mine = {delivery.message.key or b"" for delivery in came}
                assert not mine & at_work, "a key was handed to two members at once"
                at_work.update(mine)
                await anyio.sleep(0.01)
                handled.extend((delivery.message.key or b"", int(delivery.message.body)) for delivery in came)
                at_work.difference_update(mine)
                await member.settle(*[Ack(delivery) for delivery in came])

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for limit in (1, 5, 50):
                tasks.start_soon(work, limit)

    for key in keys:
        numbers = [number for other, number in handled if other == key]
        assert numbers == sorted(numbers)
    assert len(handled) == 120


@promise("C3")
async def test_a_stuck_key_with_a_deep_backlog_holds_up_no_other(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(400, key=b"stuck"))
    async with stage.member() as owner, stage.member() as other:
        (head,) = await owner.take(1, limit=1)
        assert head.message.key == b"stuck"
        await stage.publish(*[stage.message(b"free", key=b"free %d" % number) for number in range(20)])
        free: list[bytes] = []

        async def work(member: Member) -> None:
            while len(free) < 20:
                came = await member.receive(50, wait=timedelta(seconds=0.1))
                free.extend(body for body in bodies(came) if body == b"free")
                await member.settle(*[Ack(one) if one.message.body == b"free" else Release(one) for one in came])

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work, owner)
                tasks.start_soon(work, other)

        assert not await owner.settle(Ack(head))


@promise("C7")
async def test_a_lease_that_is_renewed_does_not_end(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"slow"))
    async with stage.member(lease=LEASE) as slow, stage.member() as other:
        (delivery,) = await slow.take(1)
        for _ in range(8):
            await anyio.sleep(LEASE.total_seconds() / 4)
            assert list(await slow.subscription.extend([delivery])) == [delivery]

        await other.nothing_comes(during=SOON)
        assert not await slow.settle(Ack(delivery))
        await other.nothing_comes(during=LEASE)


@promise("C8")
async def test_what_is_released_is_at_once_anothers_and_counts_as_nothing(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(3, key=b"k"))
    async with stage.member() as one, stage.member() as other:
        held = await one.take(3)
        await one.settle(*[Release(delivery) for delivery in held])

        again = await other.take(3)

        assert bodies(again) == [b"0", b"1", b"2"]
        assert [(delivery.attempt, delivery.redelivered) for delivery in again] == [(1, False)] * 3
        await other.settle(*[Ack(delivery) for delivery in again])


@promise("C8")
async def test_closing_a_member_gives_back_what_it_holds_without_waiting_for_its_lease(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(5))
    async with stage.member(lease=timedelta(minutes=10)) as leaving:
        await leaving.take(5)

    async with stage.member() as other:
        again = await other.handle(5)

    assert [(delivery.attempt, delivery.redelivered) for delivery in again] == [(1, False)] * 5


@promise("C10")
async def test_a_receive_keeps_its_limits_but_gives_one_that_is_larger(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*[stage.message(b"x" * 100) for _ in range(10)])
    async with stage.member() as member:
        wait = timedelta(seconds=5)
        assert 1 <= len(await member.subscription.receive(3, max_bytes=10_000, wait=wait)) <= 3
        assert len(await member.subscription.receive(10, max_bytes=250, wait=wait)) in (1, 2)
        assert len(await member.subscription.receive(10, max_bytes=10, wait=wait)) == 1


@promise("C11")
async def test_bytes_that_are_no_json_are_delivered_as_they_are(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"\xff\x00{", content_type="application/json"))

    async with stage.member() as member:
        assert bodies(await member.handle(1)) == [b"\xff\x00{"]


@promise("C12")
async def test_settling_twice_is_the_same_as_once(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*stage.numbered(2, key=b"k"))
    async with stage.member() as member:
        first, second = await member.take(2)
        assert not await member.settle(Ack(first))
        await member.settle(Ack(first), Retry(first, timedelta(0)))
        assert not await member.settle(Ack(second))
        await member.nothing_comes()


@promise("C12")
async def test_a_late_settlement_is_told_and_changes_nothing_for_the_new_owner(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(stage.message(b"contested"))
    async with stage.abandoned_member(lease=LEASE) as late, stage.member() as owner:
        (stale,) = await late.take(1)
        (owned,) = await owner.take(1)

        assert list(await late.settle(Ack(stale))) == [Ack(stale)]
        assert list(await late.subscription.extend([stale])) == []
        assert list(await owner.subscription.extend([owned])) == [owned]

        await owner.settle(Release(owned))
        assert bodies(await owner.handle(1)) == [b"contested"]


@promise("C12")
async def test_a_late_retry_or_release_is_told_and_takes_nothing_from_the_new_owner(stage: Stage) -> None:
    await stage.declare()
    await stage.publish(*[stage.message(key=b"%d" % number) for number in range(3)])
    async with stage.abandoned_member(lease=LEASE) as late, stage.member() as owner:
        one, two, three = await late.take(3)
        owned = await owner.take(3)

        told = await late.settle(Retry(one, timedelta(0)), Retry(two, timedelta(0), keep_order=False), Release(three))
        assert {settlement.delivery.receipt for settlement in told} == {one.receipt, two.receipt, three.receipt}
        await owner.nothing_comes()
        assert list(await owner.subscription.extend(owned)) == owned

        assert not await owner.settle(*[Retry(delivery, timedelta(0), counts=False) for delivery in owned])
        assert [delivery.failures for delivery in await owner.handle(3)] == [0, 0, 0]


@promise("C1")
async def test_cancelling_a_receive_loses_nothing(stage: Stage) -> None:
    await stage.declare()
    async with stage.member() as member:
        for number in range(20):
            with anyio.move_on_after(0.002 * (number % 4)):
                await member.receive()
            await stage.publish(stage.message(b"%d" % number))
            with anyio.move_on_after(0.001 * (number % 5)):
                await member.receive()

    async with stage.member() as member:
        remaining = await member.receive(wait=timedelta(seconds=1))
        seen = {int(one) for one in bodies(remaining)}
        while len(seen) < 20:
            more = await member.receive(wait=timedelta(seconds=2))
            assert more, f"only {sorted(seen)} came back"
            seen |= {int(one) for one in bodies(more)}


@promise("C2")
async def test_many_publishers_and_members_lose_and_double_nothing(stage: Stage) -> None:
    await stage.declare()
    handled: list[bytes] = []

    async def publish(number: int) -> None:
        await stage.publish(*[stage.message(b"%d-%d" % (number, n), key=b"%d" % (n % 7)) for n in range(20)])

    async def work() -> None:
        async with stage.member() as member:
            while len(handled) < 400:
                came = await member.receive(17, wait=timedelta(seconds=0.1))
                handled.extend(bodies(came))
                await member.settle(*[Ack(delivery) for delivery in came])

    with anyio.fail_after(40):
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(publish, number)
            for _ in range(8):
                tasks.start_soon(work)

    assert sorted(handled) == sorted(b"%d-%d" % (number, n) for number in range(20) for n in range(20))
