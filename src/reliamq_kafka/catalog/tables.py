"""A compacted topic as a small durable table: what was put last for a key is its row.

It promises that a row that was put is stored on every in-sync replica, and that reading gives every row that was put
before.  Reading goes through the whole log, so a table is for what is read now and then, by people and at the start.
What rows mean is left to who owns the table.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaTimeoutError

from reliamq.spi import BrokerUnavailable, Confirmation, Outcome
from reliamq_kafka.catalog.own_topics import TABLE, create_own_topic
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin
from reliamq_kafka.wire.consumers import ANSWER_SECONDS, bounded, open_consumer
from reliamq_kafka.wire.partition_queue import PartitionQueues, Sending, Wire, concluded
from reliamq_kafka.wire.producers import LARGEST_BATCH, open_producers
from reliamq_kafka.wire.records import Headers

__all__ = ["Row", "Table", "TableWriter", "open_writer"]

POLL_MILLISECONDS = 500
ROWS_AT_ONCE = 5000


@dataclass(frozen=True, slots=True)
class Row:
    """What was put for a key.  value: None when it was removed.  offset: its place in the log, -1: not there yet."""

    key: bytes
    value: bytes | None
    headers: Headers
    offset: int = -1


class Table:
    """A table by the name of its topic.

    largest: bytes of a row with all that comes with it.
    """

    def __init__(self, admin: Admin, settings: KafkaSettings, name: str, largest: int) -> None:
        self._admin, self._settings, self.name, self.largest = admin, settings, name, largest

    async def create(self) -> None:
        """Have the topic, ready for writing.  Raises BrokerUnavailable."""
        async with bounded(self._settings, f"creating {self.name}", 2 * ANSWER_SECONDS):
            configs = {"cleanup.policy": TABLE, "max.message.bytes": str(self.largest)}
            await create_own_topic(self._admin, self._settings, self.name, 1, configs)

    async def rows(self, wanted: Callable[[bytes], bool] = lambda key: True) -> Sequence[Row]:
        """The rows with a wanted key, in the order in which they were put; none without the topic.

        Raises BrokerUnavailable.
        """
        rows: dict[bytes, Row] = {}

        def take(row: Row) -> None:
            rows.pop(row.key, None)  # what is put again goes to the end
            if row.value is not None and wanted(row.key):
                rows[row.key] = row

        await self.read(take)
        return list(rows.values())

    async def read(self, take: Callable[[Row], None]) -> None:
        """Hand the whole log to ``take``, superseded and removed rows too, up to its end as it is now.

        Raises BrokerUnavailable when it does not come any further for a while.
        """
        async with bounded(self._settings, f"looking for {self.name}"):
            if await self._admin.partitions(self.name) is None:
                return
        async with open_consumer(self._settings) as consumer:
            part = TopicPartition(self.name, 0)
            consumer.assign([part])
            async with bounded(self._settings, f"reading {self.name}"):
                beginning, end = await _bounds(consumer, part)
            consumer.seek(part, beginning)
            position = beginning
            while position < end:
                position = await self._read_on(consumer, part, position, end, take)

    async def _read_on(
        self, consumer: AIOKafkaConsumer, part: TopicPartition, position: int, end: int, take: Callable[[Row], None]
    ) -> int:
        """Read a little further; where it stands now.

        The position reaches the end also in a compacted log: what was written last is never compacted away.
        """
        start, records = position, list[ConsumerRecord]()
        async with bounded(self._settings, f"reading {self.name}"):
            while not records and position == start:
                records = (await consumer.getmany(part, timeout_ms=POLL_MILLISECONDS)).get(part, [])
                position = int(await consumer.position(part))
        for record in records:
            if record.offset < end and record.key is not None:
                take(Row(record.key, record.value, list(record.headers), record.offset))
        return position


async def _bounds(consumer: AIOKafkaConsumer, part: TopicPartition) -> tuple[int, int]:
    """Where the log begins and ends.  Asked again for as long as the caller waits: a leader that died is followed after
    some nine seconds, and the client gives up a little later.
    """
    while True:
        try:
            return (await consumer.beginning_offsets([part]))[part], (await consumer.end_offsets([part]))[part]
        except KafkaTimeoutError:
            continue


class TableWriter:
    """Puts and removes rows, in the order given, also across calls."""

    def __init__(self, wire: Wire, table: Table, settings: KafkaSettings) -> None:
        self._table, self._settings = table, settings
        self._queues = PartitionQueues(wire)
        self._queue = self._queues.to(table.name, 0, min(LARGEST_BATCH, table.largest))

    async def write(self, rows: Sequence[Row], *, names: Sequence[str] = (), deadline: float) -> Sequence[Outcome]:
        """Store rows; an outcome for each, in order, with the meaning of :meth:`reliamq.spi.Publisher.send`.

        names: by which the outcomes name them; the keys otherwise.
        Cancelled: they may be stored.
        """
        names = names or [row.key.decode(errors="replace") for row in rows]
        sendings = [Sending(name, row.key, row.value, row.headers) for name, row in zip(names, rows, strict=True)]
        self._queue.add(sendings)
        await concluded(sendings, deadline)
        return [self._queue.outcome(sending) for sending in sendings]

    async def put(self, rows: Sequence[Row]) -> None:
        """Store rows.  Raises BrokerUnavailable unless all of them are stored; some may be."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            for outcome in await self.write(part, deadline=time.monotonic() + ANSWER_SECONDS):
                if not isinstance(outcome, Confirmation):
                    raise BrokerUnavailable(self._settings.url, f"writing {self._table.name}: {outcome.detail}")

    async def remove(self, keys: Sequence[bytes]) -> None:
        """Remove rows.  Raises BrokerUnavailable unless all of them are gone; some may be."""
        await self.put([Row(key, None, []) for key in keys])

    async def close(self) -> None:
        """Stop what is on its way; it may be stored.  Bounded."""
        await self._queues.close()


@asynccontextmanager
async def open_writer(table: Table, settings: KafkaSettings) -> AsyncIterator[TableWriter]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_producers(settings) as producers:
        writer = TableWriter(producers, table, settings)
        try:
            yield writer
        finally:
            await writer.close()
