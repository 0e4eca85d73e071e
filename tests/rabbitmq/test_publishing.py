"""Safe departure on a real cluster: each caller has the outcome of its own message (P1 to P6)."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio
import pytest

from reliamq.publishing import ConfirmingPublisher
from reliamq.spi import (
    ConfigurationError,
    Confirmation,
    GroupSpec,
    Message,
    Rejected,
    Rejection,
    RejectionReason,
    TooLarge,
    TopicSpec,
    Unconfirmed,
)
from reliamq_rabbitmq.publisher import open_publisher
from reliamq_rabbitmq.settings import RabbitmqSettings, read_settings
from reliamq_rabbitmq.storage.storage import open_storage
from tests.rabbitmq.conftest import bodies, declare, delete_exchange, drain, message
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(180)]

SOON = timedelta(seconds=20)


async def outcome_of(publisher: ConfirmingPublisher, one: Message, deadline: timedelta = SOON) -> str:
    try:
        await publisher.publish(one, deadline=deadline)
    except (Rejected, Unconfirmed) as error:
        return type(error).__name__
    return "confirmed"


async def outcomes_of(publisher: ConfirmingPublisher, messages: list[Message], deadline: timedelta = SOON) -> list[str]:
    """Of so many callers side by side."""
    return list(await asyncio.gather(*[outcome_of(publisher, one, deadline) for one in messages]))


async def test_of_a_thousand_callers_each_gets_its_own_outcome_whatever_its_message_is_called(
    settings: RabbitmqSettings, topic: str
) -> None:
    """P2 P3: the client knows returned messages by their id, and here many have the same."""
    nowhere = await declare(settings)
    names = [str(uuid.uuid4()) for _ in range(7)]
    messages = [
        message(nowhere if number % 3 == 0 else topic, f"{number}", f"k{number}", id=names[number % 7])
        for number in range(1000)
    ]
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)
        outcomes = await outcomes_of(publisher, messages)
        tasks.cancel_scope.cancel()

    assert outcomes == ["Unroutable" if number % 3 == 0 else "confirmed" for number in range(1000)]
    stored = bodies(await drain(settings, topic, 666))
    assert stored == Counter(f"{number}".encode() for number in range(1000) if number % 3)


async def test_a_topic_without_a_group_is_unroutable_and_with_one_it_is_not(settings: RabbitmqSettings) -> None:
    """P3"""
    topic = await declare(settings)
    async with open_publisher(settings) as publisher:
        (before,) = await publisher.send([message(topic, "lost?")], deadline=time.monotonic() + 10)
        assert isinstance(before, Rejection)
        assert before.reason is RejectionReason.UNROUTABLE


async def test_a_message_that_is_too_large_has_a_typed_error_and_the_next_one_is_stored(
    settings: RabbitmqSettings,
) -> None:
    """P6"""
    topic = await declare(settings, "g", max_message_bytes=100_000)
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)
        with pytest.raises(TooLarge):
            await publisher.publish(message(topic, "x" * 100_001), deadline=SOON)
        await publisher.publish(message(topic, "y" * 99_000), deadline=SOON)
        tasks.cancel_scope.cancel()

    assert len(await drain(settings, topic, 1)) == 1


async def test_what_amqp_cannot_carry_is_invalid_by_name_and_its_neighbours_are_stored(
    settings: RabbitmqSettings, topic: str
) -> None:
    """P2: a header's name has 255 bytes."""
    batch = [
        message(topic, "before"),
        message(topic, "bad", headers={"ä" * 200: "long"}),
        message(topic, "worse", content_type="x" * 300),
        message(topic, "worst", headers={"large": "x" * 140_000}),
        message(topic, "no text", headers={"x": "\ud800"}),
        message("\ud800", "nowhere"),
        message(topic, "after"),
    ]
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send(batch, deadline=time.monotonic() + 10)

    assert [getattr(one, "reason", None) for one in outcomes] == [
        None,
        *[RejectionReason.INVALID] * 4,
        RejectionReason.UNROUTABLE,
        None,
    ]
    assert [one.body for one in await drain(settings, topic, 2)] == [b"before", b"after"]


async def test_headers_that_the_broker_acts_on_are_the_users_own(settings: RabbitmqSettings, topic: str) -> None:
    """P4: CC would send it elsewhere too, x-delivery-count would be counted."""
    headers = {"CC": "elsewhere", "BCC": "x", "x-delivery-count": "9", "x-death": "no", "cloudEvents:id": "other"}
    headers |= {"reliamq-failures": "3", "reliamq-due": "9e9", "reliamq-header-x": "y", "x-mine": "z"}
    async with open_publisher(settings) as publisher:
        (outcome,) = await publisher.send([message(topic, "one", headers=headers)], deadline=time.monotonic() + 10)
        assert isinstance(outcome, Confirmation)

    (stored,) = await drain(settings, topic, 1)
    assert dict(stored.headers) == headers


async def test_a_body_of_many_frames_and_an_empty_one_arrive_whole(settings: RabbitmqSettings) -> None:
    topic = await declare(settings, "g", max_message_bytes=20_000_000)
    texts = ["x" * size for size in (0, 1, 131_063, 131_064, 131_065, 262_128, 5_000_000)]
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send([message(topic, text) for text in texts], deadline=time.monotonic() + 30)
        assert {type(one) for one in outcomes} == {Confirmation}

    assert [len(one.body) for one in await drain(settings, topic, len(texts))] == [len(text) for text in texts]


async def test_an_exchange_that_is_deleted_takes_no_caller_along(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """P2: publishing to it closes the channel, and with it every other message's confirm."""
    doomed = await declare(settings, "g")
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)
        await outcomes_of(publisher, [message(doomed, "before"), message(topic, "before")])
        await delete_exchange(rabbitmq, doomed)
        mixed = [message(doomed if number % 2 else topic, f"{number}", f"k{number}") for number in range(100)]
        outcomes = await outcomes_of(publisher, mixed)
        tasks.cancel_scope.cancel()

    assert set(outcomes[::2]) == {"confirmed"}
    assert set(outcomes[1::2]) <= {"Unroutable", "Unconfirmed"}
    stored = bodies(await drain(settings, topic, 51))
    assert set(stored) == {b"before", *(f"{number}".encode() for number in range(0, 100, 2))}


async def test_a_topic_that_the_user_may_not_write_to_is_refused_and_takes_no_caller_along(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """P2: the broker closes the channel and does not say because of which message."""
    forbidden = await declare(settings, "g")
    batch = [message(forbidden if number % 5 == 2 else topic, f"{number}") for number in range(20)]
    async with (
        user_who(rabbitmq, write=f"^({topic}|amq\\.default)$", read=".*/facts$") as url,
        open_publisher(read_settings(url, {})) as publisher,
    ):
        outcomes = await publisher.send(batch, deadline=time.monotonic() + 20)

    for number, outcome in enumerate(outcomes):
        if number % 5 == 2:
            assert isinstance(outcome, Rejection)
            assert outcome.reason is RejectionReason.REFUSED
        else:
            assert isinstance(outcome, Confirmation)
    stored = [int(one.body) for one in await drain(settings, topic, 16)]
    assert list(dict.fromkeys(stored)) == [number for number in range(20) if number % 5 != 2]


async def test_a_topic_that_cannot_be_looked_up_is_refused_by_itself(
    rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    hidden = await declare(settings, "g")
    batch = [message(hidden, "hidden"), message(topic, "seen"), message(hidden, "hidden too")]
    async with (
        user_who(rabbitmq, write=".*", read=f"^{topic}/facts$") as url,
        open_publisher(read_settings(url, {})) as publisher,
    ):
        outcomes = await publisher.send(batch, deadline=time.monotonic() + 20)

    assert [getattr(one, "reason", None) for one in outcomes] == [
        RejectionReason.REFUSED,
        None,
        RejectionReason.REFUSED,
    ]


@asynccontextmanager
async def user_who(rabbitmq: RabbitmqCluster, *, write: str, read: str) -> AsyncIterator[str]:
    """The cluster's URL for a user that may not do more."""
    control, node, name = rabbitmq.control, rabbitmq.nodes[0], f"limited-{uuid.uuid4().hex[:8]}"
    await anyio.to_thread.run_sync(control, node, "add_user", name, "password")
    try:
        await anyio.to_thread.run_sync(control, node, "set_permissions", name, "^$", write, read)
        yield f"rabbitmq://{name}:password@{','.join(rabbitmq.addresses)}"
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(control, node, "delete_user", name)


async def test_a_send_that_is_cancelled_leaves_the_publisher_as_good_as_new(
    settings: RabbitmqSettings, topic: str
) -> None:
    """P2: numbers of messages that were not written must not be waited for."""
    async with open_publisher(settings) as publisher:
        for number in range(30):
            with anyio.move_on_after(0.0004 * (number % 10)):
                await publisher.send([message(topic, "perhaps")] * 50, deadline=time.monotonic() + 10)
            outcomes = await publisher.send([message(topic, f"{number}")] * 3, deadline=time.monotonic() + 10)
            assert [type(one) for one in outcomes] == [Confirmation] * 3

    stored = bodies(await drain(settings, topic, 90))
    del stored[b"perhaps"]
    assert stored == Counter({f"{number}".encode(): 3 for number in range(30)})


async def test_messages_of_a_key_are_stored_in_the_order_given_whatever_their_lanes(
    settings: RabbitmqSettings, topic: str
) -> None:
    """P5"""
    async with open_publisher(settings) as publisher:
        for start in range(0, 600, 200):
            batch = [message(topic, f"{number}", f"key {number % 17}") for number in range(start, start + 200)]
            outcomes = await publisher.send(batch, deadline=time.monotonic() + 10)
            assert {type(one) for one in outcomes} == {Confirmation}

    stored = await drain(settings, topic, 600)
    for each in range(17):
        numbers = [int(one.body) for one in stored if one.key == f"key {each}".encode()]
        assert numbers == list(range(each, 600, 17))


async def test_all_that_was_confirmed_is_there_after_all_nodes_were_killed_at_once(
    whole_rabbitmq: RabbitmqCluster, settings: RabbitmqSettings
) -> None:
    """P1"""
    await confirm_and_kill_all(whole_rabbitmq, settings, count=2_000)


async def confirm_and_kill_all(cluster: RabbitmqCluster, settings: RabbitmqSettings, count: int) -> None:
    topic = await declare(settings, "g")
    confirmed = 0
    async with open_publisher(settings) as publisher:
        while confirmed < count:
            batch = [message(topic, f"{number}", f"k{number}") for number in range(confirmed, confirmed + 500)]
            outcomes = await publisher.send(batch, deadline=time.monotonic() + 30)
            assert {type(one) for one in outcomes} == {Confirmation}
            confirmed += 500
        for node in cluster.nodes:
            node.kill()
    await anyio.to_thread.run_sync(cluster.start)

    stored = bodies(await drain(settings, topic, count))
    assert stored == Counter(f"{number}".encode() for number in range(count))


async def test_without_a_majority_nothing_is_confirmed_and_when_it_returns_all_flows(
    whole_rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """P1 P2 P6"""
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)
        assert await outcome_of(publisher, message(topic, "before")) == "confirmed"
        for node in whole_rabbitmq.nodes[:2]:
            node.kill()
        began = time.monotonic()
        outcomes = await outcomes_of(
            publisher, [message(topic, "during", f"k{number}") for number in range(50)], timedelta(seconds=4)
        )
        assert time.monotonic() - began < 6
        assert "confirmed" not in outcomes

        await anyio.to_thread.run_sync(whole_rabbitmq.start)
        assert await outcome_of(publisher, message(topic, "after"), timedelta(seconds=60)) == "confirmed"
        tasks.cancel_scope.cancel()

    stored = bodies(await drain(settings, topic, 2))
    assert stored[b"before"] == 1
    assert stored[b"after"] >= 1


async def test_a_nodes_death_costs_time_and_no_message(
    whole_rabbitmq: RabbitmqCluster, settings: RabbitmqSettings, topic: str
) -> None:
    """P1 P5"""
    confirmed: list[int] = []
    async with open_publisher(settings) as sender, anyio.create_task_group() as tasks:
        publisher = ConfirmingPublisher(sender)
        tasks.start_soon(publisher.run)

        async def publish() -> None:
            for number in range(400):
                await publisher.publish(message(topic, f"{number}"), deadline=timedelta(seconds=60))
                confirmed.append(number)

        async with anyio.create_task_group() as publishing:
            publishing.start_soon(publish)
            for node in whole_rabbitmq.nodes:
                before = len(confirmed)
                while len(confirmed) < min(before + 50, 400):
                    await anyio.sleep(0.01)
                await anyio.to_thread.run_sync(node.kill)
                await anyio.to_thread.run_sync(whole_rabbitmq.start)
                await anyio.to_thread.run_sync(whole_rabbitmq.wait_until_whole)
        tasks.cancel_scope.cancel()

    stored = [int(one.body) for one in await drain(settings, topic, 400)]
    assert list(dict.fromkeys(stored)) == list(range(400))


async def test_names_that_amqp_cannot_hold_are_refused_when_they_are_declared_and_unroutable_else(
    settings: RabbitmqSettings,
) -> None:
    """P3"""
    topic = "t" * 120
    async with open_storage(settings) as storage:
        with pytest.raises(ConfigurationError, match="has room for 117"):
            await storage.declare([TopicSpec(topic, (GroupSpec("g"),))])
    async with open_publisher(settings) as publisher:
        (outcome,) = await publisher.send([message(topic, "one")], deadline=time.monotonic() + 10)

    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectionReason.UNROUTABLE
