"""Safe departure on the embedded broker: confirmations, rejections, duplicates (P1–P6)."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import Ack, BrokerUnavailable, Confirmation, Durability, InDoubt, Rejection, RejectionReason, TopicSpec

from .conftest import LEASE, declare, message, publish, receive, soon, texts, topic

pytestmark = pytest.mark.anyio


async def test_a_batch_is_confirmed_in_order_and_arrives_unchanged_in_every_group(backend: EmbeddedBackend) -> None:
    await declare(backend, topic("orders", "billing", "mail"))
    sent = [message(f"m{n}", key, headers={"n": f"ü{n}\x00"}) for n, key in enumerate(["a", None, "", "a"])]
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "billing", lease=LEASE) as billing,
        backend.subscription("orders", "mail", lease=LEASE) as mail,
    ):
        outcomes = await publisher.send(sent, deadline=soon())
        assert outcomes == [Confirmation(one.id, str(n)) for n, one in enumerate(sent, 1)]
        for member in (billing, mail):
            assert [delivery.message for delivery in await receive(member)] == sent


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 600])
async def test_a_batch_of_any_size_is_stored_whole(backend: EmbeddedBackend, size: int) -> None:
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, *(message(str(n), "k") for n in range(size)))
        assert texts(await receive(member, size)) == [str(n) for n in range(size)]


async def test_empty_batches_do_nothing(backend: EmbeddedBackend) -> None:
    await declare(backend)
    async with (
        backend.publisher() as publisher,
        backend.dead_letters() as dead_letters,
        backend.subscription("orders", "g", lease=LEASE) as member,
    ):
        assert list(await publisher.send((), deadline=soon())) == []
        assert list(await dead_letters.add((), deadline=soon())) == []
        assert await dead_letters.remove(()) == 0
        assert list(await member.settle(())) == list(await member.begin(())) == list(await member.extend(())) == []
        assert list(await receive(member, 0)) == []


async def test_an_id_that_is_known_is_confirmed_as_duplicate_and_stored_once(backend: EmbeddedBackend) -> None:
    await declare(backend)
    first, second = message("first"), message("second")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, first)
        outcomes = await publisher.send([first, second, second], deadline=soon())
        assert outcomes == [
            Confirmation(first.id, "1", duplicate=True),
            Confirmation(second.id, "3"),
            Confirmation(second.id, "3", duplicate=True),
        ]
        assert texts(await receive(member)) == ["first", "second"]


async def test_the_same_id_in_two_topics_is_two_messages(backend: EmbeddedBackend) -> None:
    await declare(backend, topic("orders"), topic("mails"))
    async with backend.publisher() as publisher:
        twins = [message(topic=name, id="one") for name in ("orders", "mails")]
        outcomes = await publisher.send(twins, deadline=soon())
        assert outcomes == [Confirmation("one", "1"), Confirmation("one", "1")]


async def test_what_nobody_would_receive_is_rejected_as_unroutable(backend: EmbeddedBackend) -> None:
    await declare(backend, topic("orders"))
    async with backend.storage() as storage:
        await storage.declare([TopicSpec("lonely", durability=Durability.DEVELOPMENT)])
    good = message("good")
    async with backend.publisher() as publisher:
        outcomes = await publisher.send(
            [message(topic="unknown"), good, message(topic="lonely"), message(only_group="nobody")], deadline=soon()
        )
    assert [type(outcome) for outcome in outcomes] == [Rejection, Confirmation, Rejection, Rejection]
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Rejection)} == {RejectionReason.UNROUTABLE}
    assert "unknown" in outcomes[0].detail  # type: ignore[union-attr]
    assert "nobody" in outcomes[3].detail  # type: ignore[union-attr]


async def test_a_message_over_the_limit_is_rejected_and_its_neighbours_are_stored(backend: EmbeddedBackend) -> None:
    await declare(backend, topic(max_message_bytes=100))
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        batch = [message("a"), message("x" * 101), message("y" * 99, "k"), message("z" * 99, "kk")]
        outcomes = await publisher.send(batch, deadline=soon())
        assert [type(outcome) for outcome in outcomes] == [Confirmation, Rejection, Confirmation, Rejection]
        assert outcomes[1].reason is RejectionReason.TOO_LARGE  # type: ignore[union-attr]
        assert len(await receive(member)) == 2


async def test_a_value_that_sqlite_cannot_hold_is_rejected_alone(backend: EmbeddedBackend) -> None:
    await declare(backend)
    broken = message("broken", headers={"h": "v"}, id="lone surrogate \ud800")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        outcomes = await publisher.send([message("a"), broken, message("b")], deadline=soon())
        assert [type(outcome) for outcome in outcomes] == [Confirmation, Rejection, Confirmation]
        assert outcomes[1].reason is RejectionReason.INVALID  # type: ignore[union-attr]
        assert texts(await receive(member)) == ["a", "b"]


async def test_a_message_for_one_group_is_delivered_to_that_group_alone(backend: EmbeddedBackend) -> None:
    await declare(backend, topic("orders", "billing", "mail"))
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "billing", lease=LEASE) as billing,
        backend.subscription("orders", "mail", lease=LEASE) as mail,
    ):
        await publish(publisher, message("all"), message("mail", only_group="mail"), message("more"))
        assert texts(await receive(billing)) == ["all", "more"]
        assert texts(await receive(mail)) == ["all", "mail", "more"]


async def test_replaying_a_finished_message_brings_it_back_to_its_group_behind_its_key(
    backend: EmbeddedBackend,
) -> None:
    await declare(backend, topic("orders", "billing", "mail"))
    original = message("original", "k")
    replay = message("original", "k", id=original.id, only_group="mail")
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "billing", lease=LEASE) as billing,
        backend.subscription("orders", "mail", lease=LEASE) as mail,
    ):
        await publish(publisher, original)
        for member in (billing, mail):
            assert list(await member.settle([Ack(delivery) for delivery in await receive(member)])) == []
        await publish(publisher, message("later", "k"))
        again = await publisher.send([replay], deadline=soon())
        assert [outcome.duplicate for outcome in again if isinstance(outcome, Confirmation)] == [True]
        await publisher.send([replay], deadline=soon())  # repeated: still one delivery
        assert texts(await receive(billing)) == ["later"]
        (later,) = await receive(mail)
        assert texts([later]) == ["later"]
        assert list(await mail.settle([Ack(later)])) == []
        (again_delivered,) = await receive(mail)
        assert again_delivered.message == original
        assert again_delivered.attempt == 1
        await publisher.send([replay], deadline=soon())  # still unsettled: nothing new
        assert list(await mail.settle([Ack(again_delivered)])) == []
        assert texts(await receive(mail)) == []


async def test_replaying_what_the_group_has_not_seen_yet_does_not_double_it(backend: EmbeddedBackend) -> None:
    await declare(backend)
    original = message("original")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, original)
        await publisher.send([message("original", id=original.id, only_group="g")], deadline=soon())
        deliveries = await receive(member)
        assert texts(deliveries) == ["original"]
        assert list(await member.settle([Ack(delivery) for delivery in deliveries])) == []
        assert texts(await receive(member)) == []


async def test_many_publishers_at_once_share_transactions_and_each_gets_its_own_answers(
    backend: EmbeddedBackend,
) -> None:
    await declare(backend)
    answers: dict[str, str] = {}
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:

        async def one(name: str) -> None:
            (outcome,) = await publisher.send([message(name, topic="orders" if name != "7" else "no")], deadline=soon())
            answers[name] = type(outcome).__name__

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(one, str(number))
        assert answers == {str(n): "Rejection" if n == 7 else "Confirmation" for n in range(50)}
        assert len(await receive(member)) == 49


async def test_a_cancelled_publisher_leaves_a_message_that_is_stored_once(backend: EmbeddedBackend) -> None:
    await declare(backend)
    sent = message("sent")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await publisher.send([sent], deadline=soon())
        assert scope.cancelled_caught
        await publish(publisher, sent)
        assert texts(await receive(member)) == ["sent"]


# --- a file that somebody else holds -------------------------------------------------------------------------------


@contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    """The queue of writers, held as another process of reliamq would hold it: by its own open file."""
    with path.with_name(path.name + "-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def test_a_broker_that_cannot_write_until_the_deadline_says_that_nothing_was_stored(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    waiting = message("waiting")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        with held_by_another_process(tmp_path / "broker.db"), pytest.raises(BrokerUnavailable, match="nothing was"):
            await publisher.send([waiting], deadline=time.monotonic() + 0.2)
        await publish(publisher, message("after"))
        assert texts(await receive(member)) == ["after"], "what was told as not stored must not be stored later"


async def test_a_foreign_program_with_the_write_lock_makes_callers_wait(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    foreign = sqlite3.connect(tmp_path / "broker.db", isolation_level=None)
    async with backend.publisher() as publisher, anyio.create_task_group() as tasks:
        foreign.execute("BEGIN IMMEDIATE")
        tasks.start_soon(publish, publisher, message())
        await anyio.wait_all_tasks_blocked()
        (stored,) = foreign.execute("SELECT count(*) FROM message").fetchone()
        foreign.execute("ROLLBACK")
    foreign.close()
    assert stored == 0


async def test_a_foreign_program_that_never_lets_go_is_an_error_that_says_so(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db?patience_seconds=0.2")
    await declare(backend)
    foreign = sqlite3.connect(tmp_path / "broker.db", isolation_level=None)
    async with backend.publisher() as publisher:
        foreign.execute("BEGIN IMMEDIATE")
        with pytest.raises(BrokerUnavailable, match="another program holds"):
            await publisher.send([message()], deadline=soon())
        foreign.execute("ROLLBACK")
        await publish(publisher, message())
    foreign.close()


async def test_a_commit_that_is_not_finished_by_the_deadline_is_in_doubt(tmp_path: Path) -> None:
    """What has begun cannot be taken back; here a trigger makes the INSERT wait."""
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    may_go_on = threading.Event()

    def slow_down(connection: sqlite3.Connection) -> None:
        connection.create_function("pause", 0, lambda: may_go_on.wait(20))
        connection.execute("CREATE TEMP TRIGGER slow AFTER INSERT ON message BEGIN SELECT pause(); END")

    slow = message("slow")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await backend._database.read(slow_down)
        outcomes = await publisher.send([slow], deadline=time.monotonic() + 0.3)
        assert [type(outcome) for outcome in outcomes] == [InDoubt]
        may_go_on.set()
        outcomes = await publisher.send([slow], deadline=soon())
        assert outcomes == [Confirmation(slow.id, "1", duplicate=True)]
        assert texts(await receive(member)) == ["slow"]


async def test_a_message_replayed_to_several_groups_reaches_each_of_them(backend: EmbeddedBackend) -> None:
    """C5: stored once for the first group, it belongs to the second as well."""
    await declare(backend, topic("orders", "a", "b"))
    async with backend.publisher() as publisher:
        await publish(publisher, message("given up", id="x", only_group="a"))
        await publish(publisher, message("given up", id="x", only_group="b"))

    for group in ("a", "b"):
        async with backend.subscription("orders", group, lease=LEASE) as member:
            assert [one.message.only_group for one in await receive(member)] == [group]


@pytest.mark.parametrize("field", ["id", "type", "source", "content_type"])
async def test_a_nul_is_refused_and_its_neighbours_are_stored(backend: EmbeddedBackend, field: str) -> None:
    """P2"""
    await declare(backend)
    bad = replace(message("bad"), **{field: "a\0b"})  # type: ignore[arg-type]  # all of them are text
    async with backend.publisher() as publisher:
        for _ in range(2):
            outcomes = await publisher.send([message("0"), bad, message("2")], deadline=soon())
            assert [type(one) for one in outcomes] == [Confirmation, Rejection, Confirmation]
