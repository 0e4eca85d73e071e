"""Looks at what is in a topic without being a member of anything: where its log begins and ends, and how old it is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.consumers import open_consumer
from reliamq_kafka.wire.lenient import read_leniently
from reliamq_kafka.wire.records import time_of

__all__ = ["Bounds", "LogReader", "open_log_reader"]

POLL_MILLISECONDS = 200
FETCH_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Bounds:
    """start: offset of the oldest record that is kept.  end: that of the next record to come."""

    start: int
    end: int


class LogReader:
    """Raises KafkaError for what the cluster refuses or does not answer within the time of one request.

    whole: sees the whole log.  consumer: sees what a group's member sees.
    """

    def __init__(self, whole: AIOKafkaConsumer, consumer: AIOKafkaConsumer, seconds: float) -> None:
        self._whole, self._consumer, self._seconds = whole, consumer, seconds

    async def bounds(self, topic: str, partitions: Iterable[int]) -> dict[int, Bounds]:
        """Of each of these partitions, which must have leaders."""
        places = [TopicPartition(topic, number) for number in partitions]
        starts, ends = await self._whole.beginning_offsets(places), await self._whole.end_offsets(places)
        return {place.partition: Bounds(starts[place], ends[place]) for place in places}

    async def written_at(self, topic: str, offsets: Mapping[int, int]) -> dict[int, datetime | None]:
        """When the first record at or after each partition's offset was written, by the record's own time.

        None where no member of a group would get one: the ends of transactions are records too, and so is what they
        aborted.  A partition whose record did not arrive in time is missing.
        """
        places = {TopicPartition(topic, number): offset for number, offset in offsets.items()}
        self._consumer.assign(list(places))
        for place, offset in places.items():
            self._consumer.seek(place, offset)
        ends = await self._whole.end_offsets(list(places))  # behind an open transaction is what may still come
        found: dict[int, datetime | None] = {}
        deadline = time.monotonic() + self._seconds
        while len(found) < len(places) and time.monotonic() < deadline:
            left = {place: offset for place, offset in places.items() if place.partition not in found}
            for place, records in (await self._next(left)).items():
                if records:
                    found[place.partition] = time_of(records[0].timestamp)
                elif await self._consumer.position(place) >= ends[place]:
                    found[place.partition] = None
        return found

    async def _next(self, offsets: Mapping[TopicPartition, int]) -> Mapping[TopicPartition, Sequence[ConsumerRecord]]:
        """The next records of each partition; it is read from these offsets where the client cannot."""
        try:
            read = await self._consumer.getmany(*offsets, timeout_ms=POLL_MILLISECONDS)
        except UnicodeDecodeError:
            return {place: one.records for place, one in (await read_leniently(self._consumer, offsets)).items()}
        return {place: read.get(place, ()) for place in offsets}


@asynccontextmanager
async def open_log_reader(settings: KafkaSettings) -> AsyncIterator[LogReader]:
    """Connect.  Raises BrokerUnavailable."""
    # What was just removed cannot be read; the next one is.
    as_members = open_consumer(settings, isolation_level="read_committed", max_partition_fetch_bytes=FETCH_BYTES)
    async with open_consumer(settings) as whole, as_members as consumer:
        yield LogReader(whole, consumer, settings.request_timeout_seconds)
