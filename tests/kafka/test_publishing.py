"""Safe departure on a real cluster that is broken on purpose (P1 to P6)."""

from __future__ import annotations

import asyncio
import time

import pytest

from reliamq.spi import BrokerUnavailable, Confirmation, InDoubt, Message, Rejection, RejectionReason
from reliamq_kafka.publisher import open_publisher
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.records import message_of
from tests.kafka.conftest import create_topic, log_of, message
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


async def test_what_is_confirmed_is_in_the_log_with_all_that_belongs_to_it(settings: KafkaSettings, topic: str) -> None:
    """P1 P2 P4"""
    headers = {"plain": "ü", "ce_id": "not the id", "content-type": "x", "reliamq_x": "y"}
    sent = [message(topic, f"m{number}", key, headers=headers, sequence=number) for number, key in enumerate(["a", ""])]
    sent.append(message(topic, "without a key", None))
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send(sent, deadline=soon())

    assert [type(one) for one in outcomes] == [Confirmation] * 3
    stored = [
        message_of(topic, record.key, record.value, record.headers)
        for partition in await log_of(settings, topic)
        for record in partition
    ]
    assert sorted(stored, key=lambda one: one.body) == sorted(sent, key=lambda one: one.body)


async def test_what_nobody_would_receive_is_unroutable(settings: KafkaSettings, topic: str) -> None:
    """P3"""
    deserted = await create_topic(settings, group=None)
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send(
            [
                message("no-such-topic", "a"),
                message(deserted, "b"),
                message(topic, "c", only_group="nobody"),
                message(topic, "d", only_group="g"),
            ],
            deadline=soon(),
        )

    assert [getattr(one, "reason", None) for one in outcomes] == [RejectionReason.UNROUTABLE] * 3 + [None]


async def test_an_oversized_and_an_invalid_message_do_not_stop_ten_thousand_others(settings: KafkaSettings) -> None:
    """P2 P6: one refused batch breaks the client's numbering of its partition, which must not be seen."""
    topic = await create_topic(settings, **{"cleanup.policy": "compact", "max.message.bytes": "200000"})
    messages = [message(topic, f"{number:05}", f"key {number}") for number in range(10_000)]
    messages[4_000] = message(topic, "x" * 300_000, "key 4000")
    messages[6_000] = message(topic, "invalid: without a key on a compacted topic", None)
    async with open_publisher(settings) as publisher:
        outcomes = [
            one
            for start in range(0, 10_000, 500)
            for one in await publisher.send(messages[start : start + 500], deadline=soon(60))
        ]

    refused = {index: one.reason for index, one in enumerate(outcomes) if isinstance(one, Rejection)}
    assert refused == {4_000: RejectionReason.TOO_LARGE, 6_000: RejectionReason.INVALID}
    assert sum(isinstance(one, Confirmation) for one in outcomes) == 9_998
    bodies = [record.value for partition in await log_of(settings, topic) for record in partition]
    assert len(bodies) == len(set(bodies)) == 9_998
    assert all(one == sorted(one) for one in ([r.value for r in part] for part in await log_of(settings, topic)))


async def test_an_oversized_message_that_only_the_broker_notices_is_rejected_alone(settings: KafkaSettings) -> None:
    """P2: what comes with a message is more than the room that is left for it."""
    topic = await create_topic(settings, **{"max.message.bytes": "20000"})
    batch = [message(topic, "small"), message(topic, "large", id="i" * 30_000), message(topic, "small as well")]
    async with open_publisher(settings) as publisher:
        outcomes = await publisher.send(batch, deadline=soon())
        later = await publisher.send([message(topic, "later")], deadline=soon())

    assert [type(one) for one in [*outcomes, *later]] == [Confirmation, Rejection, Confirmation, Confirmation]


async def test_with_two_of_three_brokers_gone_nothing_is_confirmed_until_they_return(
    whole: KafkaCluster, settings: KafkaSettings, topic: str
) -> None:
    """P1 P4 P5 P6: by the deadline each is in doubt or certainly not stored; repeated with its id it is stored once."""
    first, second = ([message(topic, f"{wave}{number}") for number in range(50)] for wave in "ab")
    async with open_publisher(settings) as publisher:
        await publisher.send([message(topic, "0")], deadline=soon())
        for broker in whole.brokers[1:]:
            broker.kill()

        async def gives_up(messages: list[Message]) -> set[type]:
            began = time.monotonic()
            outcomes = await publisher.send(messages, deadline=soon(3))
            assert time.monotonic() - began < 5
            return {type(one) for one in outcomes}

        assert await gives_up(first) == {InDoubt}
        assert await gives_up(second) == {Rejection}  # not handed over while the first are in doubt
        assert await gives_up(first) == {InDoubt}

        await asyncio.to_thread(whole.start)
        outcomes = await publisher.send([*first, *second], deadline=soon(60))
        assert {type(one) for one in outcomes} == {Confirmation}

    stored = [record.value.decode() for partition in await log_of(settings, topic) for record in partition]
    assert stored == ["0", *(one.body.decode() for one in (*first, *second))]


async def test_a_killed_leader_costs_time_and_no_message_and_no_order(
    whole: KafkaCluster, settings: KafkaSettings, topic: str
) -> None:
    """P1 P5"""
    async with open_publisher(settings) as publisher:
        for number in range(30):
            if number == 10:
                whole.brokers[0].kill()
            batch = [message(topic, f"{number:02}-{each}", f"key {each}") for each in range(10)]
            outcomes = await publisher.send(batch, deadline=soon(60))
            assert {type(one) for one in outcomes} == {Confirmation}

    for partition in await log_of(settings, topic):
        for key in {record.key for record in partition}:
            bodies = [record.value for record in partition if record.key == key]
            assert bodies == sorted(set(bodies))
            assert len(bodies) == 30


async def test_a_topic_that_a_replaced_producer_does_not_know_is_published_to_all_the_same(
    settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P2: a closed client never learns who leads a partition; whoever waited for that would wait for ever."""
    known, unknown = await create_topic(settings, **{"max.message.bytes": "20000"}), await create_topic(settings)
    async with open_publisher(settings) as publisher:
        await publisher.send([message(known, "first")], deadline=soon())
        with monkeypatch.context() as unreachable:

            async def fail(_: object) -> None:
                raise BrokerUnavailable(settings.url, "as if nobody were there")

            unreachable.setattr("reliamq_kafka.wire.producers.Producers.start", fail)
            refused = await publisher.send([message(known, "large", id="i" * 30_000)], deadline=soon())
            assert [type(one) for one in refused] == [Rejection]
            await asyncio.sleep(1)  # the old producer is closed by now, and there is no other
            (outcome,) = await publisher.send([message(unknown, "x")], deadline=soon(1))
            assert not isinstance(outcome, Confirmation)
        outcomes = await publisher.send([message(unknown, "y")], deadline=soon(15))

    assert [type(one) for one in outcomes] == [Confirmation]
