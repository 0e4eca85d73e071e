"""Safe arrival on the embedded broker: order, leases, retries, releases (C1–C10)."""

from __future__ import annotations

import itertools
import sqlite3
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import (
    Ack,
    BrokerUnavailable,
    ConfigurationError,
    Delivery,
    Durability,
    GroupSpec,
    Publisher,
    Release,
    Retry,
    Subscription,
    TopicSpec,
)

from .conftest import LEASE, Clock, declare, message, publish, receive, soon, texts, topic

pytestmark = pytest.mark.anyio


async def test_a_key_stays_with_the_member_that_holds_it_and_other_keys_go_on(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as first,
        backend.subscription("orders", "g", lease=LEASE) as second,
    ):
        await publish(publisher, message("a1", "a"), message("a2", "a"), message("b1", "b"), message("n1"))
        held = list(await receive(first, 1))
        assert texts(held) == ["a1"]
        assert texts(await receive(second)) == ["b1", "n1"]
        await publish(publisher, message("a3", "a"))
        assert texts(await receive(second)) == []
        await first.settle([Ack(held[0])])
        assert texts(await receive(second)) == ["a2", "a3"]


async def test_a_member_may_take_more_of_a_key_that_it_holds(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, *(message(f"a{n}", "a") for n in range(3)))
        taken = [text for _ in range(4) for text in texts(await receive(member, 1))]
        assert taken == ["a0", "a1", "a2"]


async def test_a_blocked_key_with_a_long_backlog_does_not_hold_up_the_others(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as first,
        backend.subscription("orders", "g", lease=LEASE) as second,
    ):
        await publish(publisher, *(message(f"a{n}", "a") for n in range(3_000)), message("b", "b"))
        held = await receive(first, 1)
        assert texts(await receive(second, 10, wait=20)) == ["b"]
        await first.settle([Ack(held[0])])
        rest = [text for _ in range(3) for text in texts(await _all_acked(second, 1_000))]
        assert rest == [f"a{n}" for n in range(1, 3_000)]


async def _all_acked(member: Subscription, limit: int) -> Sequence[Delivery]:
    deliveries = await receive(member, limit)
    assert list(await member.settle([Ack(delivery) for delivery in deliveries])) == []
    return deliveries


async def test_a_retry_that_keeps_order_holds_its_key_and_no_other(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("a1", "a"), message("a2", "a"), message("b1", "b"))
        a1, a2, b1 = await receive(member)
        late = await member.settle([Retry(a1, timedelta(seconds=60)), Ack(b1)])
        assert list(late) == []
        assert list(await member.settle([Ack(a2)])) == [Ack(a2)], "it was taken back together with a1"
        await publish(publisher, message("a3", "a"), message("b2", "b"))
        assert texts(await _all_acked(member, 10)) == ["b2"]
        clock.advance(59)
        assert texts(await receive(member)) == []
        clock.advance(1)
        again = await receive(member)
        assert [(d.message.body, d.failures, d.crashes, d.redelivered) for d in again] == [
            (b"a1", 1, 0, False),
            (b"a2", 0, 0, False),
            (b"a3", 0, 0, False),
        ]


async def test_a_retry_that_gives_way_comes_back_behind_its_keys_others(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, *(message(f"a{n}", "a") for n in range(1, 4)))
        (a1,) = await receive(member, 1)
        await member.settle([Retry(a1, timedelta(), keep_order=False)])
        order = [text for _ in range(3) for text in texts(await _all_acked(member, 1))]
        assert order == ["a2", "a3", "a1"]


async def test_one_that_gave_way_and_waits_does_not_hold_its_key(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("a1", "a"))
        (a1,) = await receive(member)
        await member.settle([Retry(a1, timedelta(seconds=20), keep_order=False)])
        await publish(publisher, message("a2", "a"))
        (a2,) = await receive(member)
        assert texts([a2]) == ["a2"]
        clock.advance(21)
        assert texts(await receive(member)) == [], "a2 is being handled, so a1 waits for it"
        await member.settle([Ack(a2)])
        (again,) = await receive(member)
        assert (again.message.body, again.attempt) == (b"a1", 2)


async def test_one_that_gave_way_goes_before_a_later_one_that_waits_for_its_retry(
    backend: EmbeddedBackend, clock: Clock
) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("a1", "a"))
        (a1,) = await receive(member)
        await member.settle([Retry(a1, timedelta(seconds=5), keep_order=False)])
        await publish(publisher, message("a2", "a"))
        (a2,) = await receive(member)
        await member.settle([Retry(a2, timedelta(seconds=60))])
        clock.advance(6)
        assert texts(await _all_acked(member, 10)) == ["a1"]
        clock.advance(60)
        assert texts(await receive(member)) == ["a2"]


async def test_a_retry_that_does_not_count_leaves_the_attempts(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m"))
        attempts = []
        for counts in (True, False, True, True):
            (delivery,) = await receive(member)
            attempts.append(delivery.attempt)
            await member.settle([Retry(delivery, timedelta(), counts=counts, reason='with "quotes" and \u2028')])
        assert attempts == [1, 2, 2, 3]


async def test_delays_are_kept_by_the_broker_when_everybody_has_left(file_url: str, clock: Clock) -> None:
    backend = EmbeddedBackend(file_url, clock=clock)
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m", "k"))
        (delivery,) = await receive(member)
        await member.settle([Retry(delivery, timedelta(days=3))])
    clock.advance(3 * 86_400 - 1)
    async with backend.subscription("orders", "g", lease=LEASE) as member:
        assert texts(await receive(member)) == []
        clock.advance(2)
        assert [delivery.failures for delivery in await receive(member)] == [1]


async def test_a_release_puts_it_back_in_its_old_place_at_once_and_counts_nothing(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as first,
        backend.subscription("orders", "g", lease=LEASE) as second,
    ):
        await publish(publisher, message("a1", "a"), message("a2", "a"), message("b1", "b"))
        a1, a2, b1 = await receive(first)
        assert list(await first.settle([Release(a2), Release(b1), Release(a1)])) == []
        back = await receive(second)
        assert [(d.message.body, d.attempt, d.redelivered) for d in back] == [
            (b"a1", 1, False),
            (b"a2", 1, False),
            (b"b1", 1, False),
        ]


async def test_leaving_gives_back_what_is_held_at_once(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as other:
        await publish(publisher, message("a1", "a"), message("a2", "a"), message("n"))
        async with backend.subscription("orders", "g", lease=LEASE) as leaving:
            assert len(await receive(leaving)) == 3
            assert texts(await receive(other)) == []
        back = await receive(other)
        assert [(d.message.body, d.attempt, d.redelivered) for d in back] == [
            (b"a1", 1, False),
            (b"a2", 1, False),
            (b"n", 1, False),
        ]


async def test_a_lease_that_runs_out_hands_the_message_to_another_and_the_late_ack_changes_nothing(
    backend: EmbeddedBackend, clock: Clock
) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as slow,
        backend.subscription("orders", "g", lease=LEASE) as quick,
    ):
        await publish(publisher, message("a1", "a"))
        (late,) = await receive(slow)
        clock.advance(LEASE.total_seconds() + 1)
        (again,) = await receive(quick)
        assert (again.message, again.redelivered, again.attempt) == (late.message, True, 1)
        assert list(await slow.extend([late])) == list(await slow.begin([late])) == []
        for settlement in (Ack(late), Release(late), Retry(late, timedelta())):
            assert list(await slow.settle([settlement])) == [settlement]
        assert list(await quick.extend([again])) == [again]
        assert list(await quick.settle([Ack(again)])) == []
        assert list(await quick.settle([Ack(again)])) == [], "settling twice is the same as once"
        assert list(await slow.settle([Ack(late)])) == [Ack(late)]


async def test_an_ack_after_the_lease_counts_while_nobody_else_has_the_message(
    backend: EmbeddedBackend, clock: Clock
) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m"))
        (delivery,) = await receive(member)
        clock.advance(100)
        assert list(await member.settle([Ack(delivery)])) == []
        assert texts(await receive(member)) == []


async def test_when_an_earlier_one_of_a_key_is_lost_the_later_ones_are_lost_with_it(
    backend: EmbeddedBackend, clock: Clock
) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as slow,
        backend.subscription("orders", "g", lease=LEASE) as quick,
    ):
        await publish(publisher, message("a1", "a"), message("a2", "a"))
        _, a2 = await receive(slow)
        clock.advance(20)
        assert list(await slow.extend([a2])) == [a2]
        clock.advance(11)
        assert texts(await receive(quick)) == ["a1", "a2"]
        assert list(await slow.settle([Ack(a2)])) == [Ack(a2)]


async def test_extending_keeps_a_slow_handlers_message(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as slow,
        backend.subscription("orders", "g", lease=LEASE) as other,
    ):
        await publish(publisher, message("m"))
        (delivery,) = await receive(slow)
        for _ in range(5):
            clock.advance(20)
            assert list(await slow.extend([delivery])) == [delivery]
            assert texts(await receive(other)) == []
        assert list(await slow.settle([Ack(delivery)])) == []


async def test_a_recorded_start_that_nobody_settles_counts_as_a_crash(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m"))
        seen = []
        for start in (False, True, True, False):
            (delivery,) = await receive(member)
            seen.append((delivery.attempt, delivery.crashes, delivery.redelivered))
            if start:
                assert list(await member.begin([delivery])) == [delivery]
            clock.advance(31)
        assert seen == [(1, 0, False), (1, 0, True), (2, 1, True), (3, 2, True)]
        (delivery,) = await receive(member)
        assert delivery.crashes == 2, "handed out but never started: no crash"


async def test_failures_and_crashes_add_up(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m", "k"))
        (delivery,) = await receive(member)
        await member.begin([delivery])
        await member.settle([Retry(delivery, timedelta())])
        (delivery,) = await receive(member)
        assert (delivery.failures, delivery.crashes) == (1, 0), "a start that was settled is no crash"
        await member.begin([delivery])
        clock.advance(31)
        (delivery,) = await receive(member)
        assert (delivery.failures, delivery.crashes, delivery.attempt) == (1, 1, 3)


# --- limits and waiting --------------------------------------------------------------------------------------------


async def test_a_hand_out_keeps_to_its_limits_but_gives_one_however_large(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, *(message(f"{n}" * 1_000, key) for n, key in enumerate("aabbbc")))

        async def take(limit: int, max_bytes: int) -> list[str]:
            deliveries = await member.receive(limit, max_bytes=max_bytes, wait=timedelta())
            return [text[0] for text in texts(deliveries)]

        assert await take(10, 10) == ["0"]
        assert await take(10, 2_500) == ["1", "2"]
        assert await take(1, 10_000) == ["3"]
        assert await take(10, 10_000) == ["4", "5"]


async def test_limits_hold_for_what_was_set_aside_too(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as first,
        backend.subscription("orders", "g", lease=LEASE) as second,
    ):
        await publish(publisher, *(message(f"{key}{n}" * 500, key) for n, key in itertools.product(range(4), "ab")))
        held = await receive(first, 2)
        assert texts(await receive(second)) == []
        await first.settle([Ack(delivery) for delivery in held])
        deliveries = await second.receive(10, max_bytes=2_500, wait=timedelta())
        assert [text[:2] for text in texts(deliveries)] == ["a1", "b1"]
        await second.settle([Ack(delivery) for delivery in deliveries])
        deliveries = await second.receive(3, max_bytes=100_000, wait=timedelta())
        assert [text[:2] for text in texts(deliveries)] == ["a2", "b2", "a3"]


async def test_a_waiting_receiver_is_woken_by_a_publish(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as member,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_publish_when_blocked, publisher)
        with anyio.fail_after(20):
            assert texts(await receive(member, wait=60)) == ["news"]


async def _publish_when_blocked(publisher: Publisher) -> None:
    await anyio.wait_all_tasks_blocked()
    await publish(publisher, message("news"))


async def test_a_waiting_receiver_is_woken_by_another_backend_on_the_same_file(file_url: str) -> None:
    """Another connection stands for another process: what it commits is found by looking."""
    backend, other = EmbeddedBackend(file_url), EmbeddedBackend(f"{file_url}?patience_seconds=20")
    await declare(backend)
    async with (
        other.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as member,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(_publish_when_blocked, publisher)
        with anyio.fail_after(20):
            assert texts(await receive(member, wait=60)) == ["news"]


async def test_a_waiting_receiver_gets_a_delayed_message_when_it_is_due(url: str) -> None:
    backend = EmbeddedBackend(url)
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m"))
        (delivery,) = await receive(member)
        start = time.monotonic()
        await member.settle([Retry(delivery, timedelta(seconds=0.3))])
        assert texts(await receive(member, wait=20)) == ["m"]
        assert 0.25 <= time.monotonic() - start < 15


async def test_a_waiting_receiver_gets_what_a_silent_member_lost(url: str) -> None:
    backend = EmbeddedBackend(url)
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=timedelta(seconds=0.3)) as silent,
        backend.subscription("orders", "g", lease=LEASE) as member,
    ):
        await publish(publisher, message("m"))
        assert len(await receive(silent)) == 1
        assert [delivery.redelivered for delivery in await receive(member, wait=20)] == [True]


async def test_a_cancelled_receive_gives_back_what_it_had_taken(url: str) -> None:
    """Cancelled at any moment: the messages are there for the next one, long before the lease is over."""
    backend = EmbeddedBackend(url)
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as hasty,
        backend.subscription("orders", "g", lease=LEASE) as member,
    ):
        await publish(publisher, *(message(str(n), "k") for n in range(20)))
        for pause in range(20):
            with anyio.move_on_after(pause / 10_000):
                deliveries = await receive(hasty, 5)
                await hasty.settle([Release(delivery) for delivery in deliveries])
        got = await receive(member, 20, wait=20)
        assert texts(got)[: len(got)] == [str(n) for n in range(len(got))]
        while len(got) < 20:
            await member.settle([Release(delivery) for delivery in got])
            with anyio.fail_after(10):
                got = await receive(member, 20, wait=5)
        assert [(d.attempt, d.redelivered) for d in got] == [(1, False)] * 20


async def test_an_idle_receive_writes_nothing(file_url: str, tmp_path: Path) -> None:
    backend = EmbeddedBackend(file_url)
    await declare(backend)
    async with backend.subscription("orders", "g", lease=LEASE) as member:
        await receive(member)
        wal = tmp_path / "broker.db-wal"
        before = (wal.stat().st_mtime_ns, wal.stat().st_size)
        assert texts(await receive(member, wait=0.5)) == []
        assert (wal.stat().st_mtime_ns, wal.stat().st_size) == before


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_a_group_gets_what_was_published_while_nobody_was_there_and_a_new_group_starts_at_the_earliest(
    backend: EmbeddedBackend,
) -> None:
    await declare(backend)
    async with backend.publisher() as publisher:
        await publish(publisher, message("old", "k"))
        await declare(backend, topic("orders", "g", "late"))
        async with backend.storage() as storage:
            latest = TopicSpec("orders", (GroupSpec("new", "latest"),), Durability.DEVELOPMENT)
            assert await storage.declare([latest]) == []
        await publish(publisher, message("new", "k"))
        for group, expected in {"g": ["old", "new"], "late": ["old", "new"], "new": ["new"]}.items():
            async with backend.subscription("orders", group, lease=LEASE) as member:
                assert texts(await receive(member)) == expected


async def test_a_group_that_is_not_declared_cannot_be_joined(backend: EmbeddedBackend) -> None:
    await declare(backend)
    for name, group in (("orders", "nobody"), ("nothing", "g")):
        with pytest.raises(BrokerUnavailable, match="declare it"):
            async with backend.subscription(name, group, lease=LEASE):
                pytest.fail("it was joined")
    with pytest.raises(ConfigurationError, match="lease"):
        async with backend.subscription("orders", "g", lease=timedelta()):
            pytest.fail("it was joined")


async def test_topics_do_not_mix(backend: EmbeddedBackend) -> None:
    await declare(backend, topic("orders"), topic("mails"))
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "g", lease=LEASE) as orders,
        backend.subscription("mails", "g", lease=LEASE) as mails,
    ):
        batch = [message(f"{name}{n}", "k", topic=name) for n, name in itertools.product(range(3), ("orders", "mails"))]
        outcomes = await publisher.send(batch, deadline=soon())
        assert [outcome.message_id for outcome in outcomes] == [one.id for one in batch]
        assert texts(await receive(orders)) == ["orders0", "orders1", "orders2"]
        assert texts(await receive(mails)) == ["mails0", "mails1", "mails2"]


async def test_settling_twice_in_one_batch_is_settling_once(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m", "k"))
        (delivery,) = await receive(member)
        twice = [Retry(delivery, timedelta()), Retry(delivery, timedelta()), Ack(delivery)]
        assert list(await member.settle(twice)) == []
        (again,) = await receive(member)
        assert again.failures == 1


async def test_an_old_receipt_settles_nothing_beside_the_new_one(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("m"))
        (old,) = await receive(member)
        await member.settle([Release(old)])
        (new,) = await receive(member)
        assert list(await member.begin([old, new])) == list(await member.extend([old, new])) == [new]
        assert list(await member.settle([Ack(old), Retry(new, timedelta())])) == [], "old was settled before"
        assert [delivery.failures for delivery in await receive(member)] == [1]


async def test_what_a_hand_out_in_doubt_took_is_not_overtaken_by_later_ones_of_its_key(tmp_path: Path) -> None:
    """C3: the member never saw it, and must not be taken for its owner.  Here a trigger makes the hand-out wait."""
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db?patience_seconds=0.3")
    await declare(backend)
    may_go_on = threading.Event()

    def slow_down(connection: sqlite3.Connection) -> None:
        connection.create_function("pause", 0, lambda: may_go_on.wait(20))
        connection.execute("CREATE TEMP TRIGGER slow AFTER UPDATE ON group_ BEGIN SELECT pause(); END")

    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, message("first", "k"))
        await backend._database.read(slow_down)
        with pytest.raises(BrokerUnavailable, match="not finished"):
            await receive(member)
        may_go_on.set()
        await publish(publisher, message("second", "k"))
        assert texts(await receive(member)) == ["first", "second"]
