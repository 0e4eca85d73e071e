"""Ways to partitions of any topic, for records that are handed on as they are.

Nothing is connected before the first record.  It promises an outcome for each record by the caller's deadline, and that
what goes to one partition is stored in the order given (P5).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from reliamq.spi import Outcome
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.consumers import bounded
from reliamq_kafka.wire.partition_queue import PartitionQueues, Sending, concluded
from reliamq_kafka.wire.producers import LARGEST_BATCH, Producers

__all__ = ["Addressed", "Lines"]


@dataclass(frozen=True, slots=True)
class Addressed:
    """A record and where it goes.  largest: bytes of a record batch that its topic takes."""

    topic: str
    partition: int
    sending: Sending
    largest: int = LARGEST_BATCH


class Lines:
    """A queue for each partition, on one producer."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._producers: Producers | None = None
        self._queues: PartitionQueues | None = None
        self._connecting = asyncio.Lock()

    async def send(self, batch: Sequence[Addressed], *, deadline: float) -> Sequence[Outcome]:
        """Store records; an outcome for each, in order, with the meaning of :meth:`reliamq.spi.Publisher.send`.

        Raises BrokerUnavailable when none could be tried.  Cancelled: they may be stored.
        deadline: monotonic seconds.
        """
        if not batch:
            return ()
        known = await self._connected(deadline)
        queues = [known.to(one.topic, one.partition, min(one.largest, LARGEST_BATCH)) for one in batch]
        for queue, one in zip(queues, batch, strict=True):
            queue.add([one.sending])
        await concluded([one.sending for one in batch], deadline)
        return [queue.outcome(one.sending) for queue, one in zip(queues, batch, strict=True)]

    async def _connected(self, deadline: float) -> PartitionQueues:
        async with bounded(self._settings, "connecting", deadline - time.monotonic()), self._connecting:
            if self._queues is None:
                producers = Producers(self._settings)
                await producers.start()
                self._producers, self._queues = producers, PartitionQueues(producers)
            return self._queues

    async def close(self) -> None:
        """Stop what is on its way; it may be stored.  Bounded."""
        if self._queues is not None:
            await self._queues.close()
        if self._producers is not None:
            await self._producers.stop()
