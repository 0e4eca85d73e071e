"""What is on its way to a partition, when the client says that it does not know (P2 P5).

The client's own batches, and a producer that answers as real ones did; on a cluster these moments cannot be met.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RequestTimedOutError
from aiokafka.producer.message_accumulator import BatchBuilder

from reliamq.spi import Confirmation, InDoubt, Outcome, Rejection
from reliamq_kafka.wire.partition_queue import PartitionQueue, Sending, concluded

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


async def test_a_producer_that_cannot_be_made_again_leaves_nobody_waiting() -> None:
    found = await outcomes(Producer(MessageSizeTooLargeError(), replacing=RuntimeError("certificate")), [10, 10])

    assert [type(one) for one in found] == [InDoubt, InDoubt]


async def test_what_cannot_be_written_is_rejected_alone() -> None:
    wrong = Sending("wrong", b"k", b"x", [("name", "text")])  # type: ignore[list-item]  # a header must be bytes

    found = await outcomes_of(Producer(), Sending("a", b"k", b"x", []), wrong, Sending("b", b"k", b"x", []))

    assert [type(one) for one in found] == [Confirmation, Rejection, Confirmation]


async def test_an_error_that_nobody_knows_is_doubt() -> None:
    (only,) = await outcomes(Producer(KafkaError("what?")), [10])
    assert isinstance(only, InDoubt)
    (only,) = await outcomes(Producer(), [10])
    assert isinstance(only, Confirmation)
