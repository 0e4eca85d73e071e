"""Looks at what is in a topic without being a member of anything: where its log begins and ends, and how old it is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from aiokafka import AIOKafkaConsumer, TopicPartition

from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.consumers import known_positions, open_consumer
from reliamq_kafka.wire.lenient import next_records
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
        left = {TopicPartition(topic, number): offset for number, offset in offsets.items()}
        self._consumer.assign(list(left))
        for place, offset in left.items():
            self._consumer.seek(place, offset)
        ends = await self._whole.end_offsets(list(left))  # behind an open transaction is what may still come
        found: dict[int, datetime | None] = {}
        deadline = time.monotonic() + self._seconds
        while left and time.monotonic() < deadline:
            read = await next_records(self._consumer, left, milliseconds=POLL_MILLISECONDS)
            left |= await known_positions(self._consumer, left)
            for place in list(left):
                if records := read.get(place):
                    found[place.partition] = time_of(records[0].timestamp)
                elif left[place] >= ends[place]:
                    found[place.partition] = None
                else:
                    continue
                self._consumer.pause(place)
                del left[place]
        return found


@asynccontextmanager
async def open_log_reader(settings: KafkaSettings) -> AsyncIterator[LogReader]:
    """Connect.  Raises BrokerUnavailable."""
    # What was just removed cannot be read; the next one is.
    as_members = open_consumer(settings, isolation_level="read_committed", max_partition_fetch_bytes=FETCH_BYTES)
    async with open_consumer(settings) as whole, as_members as consumer:
        yield LogReader(whole, consumer, settings.request_timeout_seconds)
