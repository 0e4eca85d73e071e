"""Looks at what is in a topic without being a member of anything: where its log begins and ends, and how old it is."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from aiokafka import AIOKafkaConsumer, TopicPartition

from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.consumers import open_consumer
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
    """Raises KafkaError for what the cluster refuses or does not answer within the time of one request."""

    def __init__(self, consumer: AIOKafkaConsumer, seconds: float) -> None:
        self._consumer, self._seconds = consumer, seconds

    async def bounds(self, topic: str, partitions: Iterable[int]) -> dict[int, Bounds]:
        """Of each of these partitions, which must have leaders."""
        places = [TopicPartition(topic, number) for number in partitions]
        starts, ends = await self._consumer.beginning_offsets(places), await self._consumer.end_offsets(places)
        return {place.partition: Bounds(starts[place], ends[place]) for place in places}

    async def written_at(self, topic: str, offsets: Mapping[int, int]) -> dict[int, datetime]:
        """When the first record at or after each partition's offset was written, by the record's own time.

        A partition whose record did not arrive in time is missing.
        """
        places = {TopicPartition(topic, number): offset for number, offset in offsets.items()}
        self._consumer.assign(list(places))
        for place, offset in places.items():
            self._consumer.seek(place, offset)
        found: dict[int, datetime] = {}
        deadline = time.monotonic() + self._seconds
        while len(found) < len(places) and time.monotonic() < deadline:
            for place, records in (await self._consumer.getmany(timeout_ms=POLL_MILLISECONDS)).items():
                found.setdefault(place.partition, time_of(records[0].timestamp))
                self._consumer.pause(place)
        return found


@asynccontextmanager
async def open_log_reader(settings: KafkaSettings) -> AsyncIterator[LogReader]:
    """Connect.  Raises BrokerUnavailable."""
    # What was just removed cannot be read; the next one is.
    async with open_consumer(settings, max_partition_fetch_bytes=FETCH_BYTES) as consumer:
        yield LogReader(consumer, settings.request_timeout_seconds)
