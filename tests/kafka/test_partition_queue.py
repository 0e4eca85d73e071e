"""What is on its way to a partition, when the client says that it does not know (P2 P5).

The client's own batches, and a producer that answers as real ones did; on a cluster these moments cannot be met.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from aiokafka.errors import (
    CorruptRecordException,
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
)
from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import Confirmation, InDoubt, Message, Outcome, Rejection, RejectionReason
from reliamq.spi.chains import Chains
from reliamq_kafka.catalog.topics import KnownTopics, TopicFacts
from reliamq_kafka.publisher import KafkaPublisher
from reliamq_kafka.wire.partition_queue import ATTEMPTS, PartitionQueue, PartitionQueues, Sending, concluded
from tests.kafka.conftest import message

pytestmark = pytest.mark.anyio


class Producer:
    """Answers one batch after another as ``answers`` says; None stores it."""

    def __init__(self, *answers: Exception | None, replacing: Exception | None = None) -> None:
        self.answers, self.replacing, self.generation, self.stored = list(answers), replacing, 0, 0

    def new_batch(self) -> BatchBuilder:
        return BatchBuilder(1_000_000, 0, is_transactional=False)

    async def deliver(self, batch: BatchBuilder, topic: str, partition: int) -> int:
        await asyncio.sleep(0)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.stored += batch.record_count()
        return 0

    async def replace(self, generation: int) -> None:
        if self.replacing is not None:
            raise self.replacing
        self.generation += 1


async def outcomes(producer: Producer, sizes: Sequence[int], limit: int = 1_000) -> list[Outcome | None]:
    return await outcomes_of(
        producer, *(Sending(str(n), b"k", b"x" * size, []) for n, size in enumerate(sizes)), limit=limit
    )


async def outcomes_of(producer: Producer, *sendings: Sending, limit: int = 1_000) -> list[Outcome | None]:
    queue = PartitionQueue(producer, "t", 0, limit)
    queue.add(sendings)
    await concluded(sendings, asyncio.get_running_loop().time() + 5)
    return [sending.outcome for sending in sendings]


async def test_nothing_is_stored_behind_what_is_in_doubt() -> None:
    producer = Producer(RequestTimedOutError())

    first, *behind = await outcomes(producer, [900, 900, 900])

    assert isinstance(first, InDoubt)
    assert [type(one) for one in behind] == [Rejection, Rejection]
    assert not any(isinstance(one, Rejection) and one.reason.judges_message for one in behind)
    assert (producer.stored, producer.generation) == (0, 1)


async def test_while_the_guilty_are_looked_for_nothing_is_stored_behind_what_is_in_doubt() -> None:
    producer = Producer(MessageSizeTooLargeError(), RequestTimedOutError())

    found = await outcomes(producer, [10, 10, 10, 10])

    assert [type(one) for one in found] == [InDoubt, InDoubt, Rejection, Rejection]


def chained(*keys: str) -> list[Sending]:
    """Messages named by key and place, each in its key's chain."""
    chains, sendings = Chains(), []
    for key in keys:
        place = chains.join(message("t", "", key))
        sending = Sending(f"{key}{place.number if place else ''}", key.encode(), b"x" * 10, [])
        sending.take(place)
        sendings.append(sending)
    return sendings


async def test_behind_a_message_that_kafka_refuses_its_key_stops_and_the_others_are_stored() -> None:
    """P5; halves until the guilty one is found, and then what is behind it in the other half is taken out."""
    too_large = MessageSizeTooLargeError()
    sendings = chained("a", "b", "b", "a", "c", "b")
    producer = Producer(too_large, too_large, None, too_large, too_large)  # all; a0 b0 b1; a0; b0 b1; b0

    found = await outcomes_of(producer, *sendings)

    reasons = {one.message_id: one.reason for one in found if isinstance(one, Rejection)}
    assert reasons == {"b0": RejectionReason.TOO_LARGE, "b1": RejectionReason.BEHIND, "b2": RejectionReason.BEHIND}
    assert [type(one) for one in found] == [Confirmation, Rejection, Rejection, Confirmation, Confirmation, Rejection]
    assert producer.stored == 3


async def test_behind_a_message_of_an_earlier_batch_that_kafka_refuses_its_key_stops() -> None:
    """P5"""
    sendings = chained("b", "a", "b", "a")

    found = await outcomes_of(Producer(MessageSizeTooLargeError()), *sendings, limit=10)

    assert [getattr(one, "reason", None) for one in found] == [
        RejectionReason.TOO_LARGE,
        None,
        RejectionReason.BEHIND,
        None,
    ]


async def test_a_producer_that_cannot_be_made_again_leaves_nobody_waiting() -> None:
    found = await outcomes(Producer(MessageSizeTooLargeError(), replacing=RuntimeError("certificate")), [10, 10])

    assert [type(one) for one in found] == [InDoubt, InDoubt]


def a_message(headers: Mapping[Any, Any]) -> Sending:
    return Sending("wrong", None, b"x", Message("t", b"x", "wrong", "T", "s", datetime.now(UTC), headers=headers))


@pytest.mark.parametrize(
    "wrong",
    [
        Sending("wrong", b"k", b"x", [("name", "text")]),  # type: ignore[list-item]  # a header must be bytes
        a_message({"name": b"bytes"}),  # and a message's must be text
        a_message({"name": "\udfff"}),
        a_message({1: "one"}),
    ],
)
async def test_what_cannot_be_written_is_rejected_alone(wrong: Sending) -> None:
    found = await outcomes_of(Producer(), Sending("a", b"k", b"x", []), wrong, Sending("b", b"k", b"x", []))

    assert [type(one) for one in found] == [Confirmation, Rejection, Confirmation]


class SlowBatch(BatchBuilder):  # type: ignore[misc]  # the client has no types
    """Somebody else has the processor while it is filled."""

    def append(self, **record: object) -> object:
        if self.record_count() == 1:
            time.sleep(0.1)
        return super().append(**record)


@pytest.mark.parametrize("size", range(900, 930))
async def test_a_batch_that_is_written_once_more_confirms_no_message_that_it_has_no_room_for(size: int) -> None:
    producer = Producer(OutOfOrderSequenceNumber())
    new_batches: list[type[BatchBuilder]] = [BatchBuilder, SlowBatch]
    producer.new_batch = lambda: (new_batches.pop(0) if new_batches else BatchBuilder)(64 * 1024, 0)  # type: ignore[method-assign]

    found = await outcomes(producer, [size] * 100, limit=64 * 1024)

    assert [type(one) for one in found] == [Confirmation] * 100
    assert producer.stored == 100


async def test_what_is_refused_for_all_that_goes_there_is_tried_once_and_not_message_by_message() -> None:
    producer = Producer(*[TopicAuthorizationFailedError()] * 20)

    found = await outcomes(producer, [10] * 8)

    assert {one.reason for one in found if isinstance(one, Rejection)} == {RejectionReason.REFUSED}
    assert (len(found), producer.generation) == (8, 1)


async def test_what_never_gets_through_is_given_back_with_all_that_waits_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reliamq_kafka.wire.partition_queue.AGAIN_PAUSE_SECONDS", 0)

    found = await outcomes(Producer(*[CorruptRecordException()] * ATTEMPTS), [900, 900, 900])

    assert [one.reason for one in found if isinstance(one, Rejection)] == [RejectionReason.UNAVAILABLE] * 3


async def test_whoever_asks_again_and_again_for_what_hangs_leaves_nothing_behind() -> None:
    hanging = Sending("1", b"k", b"x", [])
    for _ in range(3):
        await concluded([hanging], time.monotonic() + 0.01)
    assert not hanging.waiters


async def test_a_closed_queue_sends_nothing_and_says_so() -> None:
    producer = Producer()
    queues = PartitionQueues(producer)
    before, after = Sending("1", b"k", b"x", []), Sending("2", b"k", b"x", [])
    queue = queues.to("t", 0, 1_000)
    queue.add([before])
    await queues.close()

    queue.add([after])

    assert isinstance(before.outcome, Rejection)
    assert isinstance(after.outcome, Rejection)
    assert producer.stored == 0


class Topics:
    """One topic of one partition."""

    async def of(self, topic: str, **_: object) -> TopicFacts:
        return TopicFacts(1, 1_000_000, frozenset({"g"}))

    async def close(self) -> None:
        pass


async def test_what_is_repeated_after_a_doubt_is_stored_before_what_comes_with_it() -> None:
    """P5"""
    producer = Hanging()
    publisher = KafkaPublisher(producer, cast(KnownTopics, Topics()), {"t": 1})
    first, second = message("t", "first"), message("t", "second")

    (hung,) = await publisher.send([first], deadline=time.monotonic() + 0.05)
    assert isinstance(hung, InDoubt)
    producer.fail(RequestTimedOutError())
    await asyncio.sleep(0)
    outcomes = await publisher.send([first, second], deadline=time.monotonic() + 5)

    assert [type(one) for one in outcomes] == [Confirmation, Confirmation]
    assert producer.stored == 2


class Hanging(Producer):
    """The first batch is on its way until it is told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self._first: asyncio.Future[int] | None = asyncio.get_running_loop().create_future()

    async def deliver(self, batch: BatchBuilder, topic: str, partition: int) -> int:
        if self._first is not None:
            return await self._first
        return await super().deliver(batch, topic, partition)

    def fail(self, error: Exception) -> None:
        assert self._first is not None
        self._first.set_exception(error)
        self._first = None


async def test_an_error_that_nobody_knows_is_doubt() -> None:
    (only,) = await outcomes(Producer(KafkaError("what?")), [10])
    assert isinstance(only, InDoubt)
    (only,) = await outcomes(Producer(), [10])
    assert isinstance(only, Confirmation)
