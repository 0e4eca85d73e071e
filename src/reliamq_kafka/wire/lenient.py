"""Reading what the client cannot: records with a header whose name is no UTF-8.

Kafka's protocol has text there, but no broker looks, and clients in C or Go write any bytes.  The client raises an
error for such a record whenever it comes to it, and what it had taken out of other partitions for the same answer is
gone.  So one answer of each leader is read here, in all partitions from where they are; the rest is left to the client.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, SupportsIndex

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED, PartitionRecords
from aiokafka.errors import CorruptRecordException, IllegalStateError, KafkaError, OffsetOutOfRangeError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy

__all__ = ["next_records"]

logger = logging.getLogger("reliamq.kafka")
LARGEST_SHARE, LARGEST_ANSWER = 1024 * 1024, 16 * 1024 * 1024
"""Bytes of one partition, and of all that have one leader; a larger batch comes alone (KIP-74)."""
FIRST_BATCH_FORMAT_WITH_HEADERS = 2
FORMAT = 16
"""Where it stands in a batch (Kafka protocol guide, record batch)."""


@dataclass(frozen=True, slots=True)
class _Read:
    """records: the next ones of a partition, names that are no text with backslashes.  end: the offset behind them."""

    records: Sequence[ConsumerRecord]
    end: int


async def next_records(
    consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int], *, milliseconds: int
) -> Mapping[TopicPartition, Sequence[ConsumerRecord]]:
    """What comes next within this time, by partition, also where the client cannot read it.

    positions: where each partition goes on that the consumer has; paused ones are passed by.  Raises KafkaError.
    """
    try:
        return await consumer.getmany(timeout_ms=milliseconds)  # type: ignore[no-any-return]  # the client has no types
    except (UnicodeDecodeError, CorruptRecordException) as error:
        if not _is_no_text(error):
            raise
        logger.warning("a record of %s has a header whose name is no UTF-8", _topics_of(positions))
    # A call that failed counts as work for ever, and the group's watch over members that hang is off; no other one runs
    consumer._subscription._fetch_count, consumer._subscription._last_fetch_ended = 0, time.monotonic()
    paused = consumer.paused()
    read = await _read({part: offset for part, offset in positions.items() if part not in paused}, consumer)
    # Also where nothing was read: what the client had taken out for its answer is gone
    for part, offset in positions.items():
        with suppress(IllegalStateError):  # it changes hands just now
            consumer.seek(part, read[part].end if part in read else offset)
    return {part: one.records for part, one in read.items()}


def _is_no_text(error: Exception) -> bool:
    return isinstance(error, UnicodeDecodeError) or isinstance(error.__cause__, UnicodeDecodeError)


def _topics_of(positions: Mapping[TopicPartition, int]) -> str:
    return ", ".join(sorted({part.topic for part in positions}))


async def _read(offsets: Mapping[TopicPartition, int], consumer: AIOKafkaConsumer) -> dict[TopicPartition, _Read]:
    """One answer of each partition's leader.  What has none, or is refused, is left out: the client finds out why.

    Raises KafkaError where the offset is not there (any more).
    """
    by_leader: dict[int, dict[TopicPartition, int]] = defaultdict(dict)
    for part, offset in offsets.items():
        leader = consumer._client.cluster.leader_for_partition(part)
        if leader is not None and leader >= 0:
            by_leader[leader][part] = offset
    # At once: each answer waits for the client's own request on the same connection
    answers = await asyncio.gather(*(_ask(consumer, leader, those) for leader, those in by_leader.items()))
    return {part: one for answer in answers for part, one in answer.items()}


async def _ask(
    consumer: AIOKafkaConsumer, leader: int, offsets: Mapping[TopicPartition, int]
) -> dict[TopicPartition, _Read]:
    isolation = READ_COMMITTED if consumer._isolation_level == "read_committed" else READ_UNCOMMITTED
    try:
        answer = await consumer._client.send(leader, FetchRequest(0, 0, LARGEST_ANSWER, isolation, _in_turn(offsets)))
    except KafkaError as error:
        logger.info("broker %d did not answer: %r", leader, error)
        consumer._client.force_metadata_update()
        return {}
    found = {}
    for part, code, rest in _partitions(answer):
        if for_code(code) is OffsetOutOfRangeError:  # sought back there each time, it would never go on
            raise OffsetOutOfRangeError({part: offsets[part]})
        if code:
            logger.info("broker %d refuses %s: %s", leader, part, for_code(code).__name__)
            consumer._client.force_metadata_update()
        else:
            aborted = rest[2] if answer.API_VERSION >= 11 else rest[-2]  # since 11 something is before the records
            read = PartitionRecords(part, _Batches(rest[-1]), aborted, offsets[part], None, None, True, isolation)
            found[part] = _Read(list(read), read.next_fetch_offset)
    return found


def _in_turn(offsets: Mapping[TopicPartition, int]) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """In any order: a batch that is larger than its share comes only in the first partition that has something."""
    wanted = [(part.topic, [(part.partition, offset, LARGEST_SHARE)]) for part, offset in offsets.items()]
    return random.sample(wanted, len(wanted))


def _partitions(answer: Any) -> Iterator[tuple[TopicPartition, int, list[Any]]]:
    """Each one's answer; of none where a broker has its clients wait."""
    for topic, partitions in answer.topics:
        for number, code, _, *rest in partitions:
            yield TopicPartition(topic, number), code, rest


class _Batches(_MemoryRecordsPy):  # type: ignore[misc]  # the client has no types
    """The client's, but for who reads a batch."""

    def next_batch(self) -> Any:
        batch = self._next_slice
        if batch is None or batch[FORMAT] < FIRST_BATCH_FORMAT_WITH_HEADERS:
            return super().next_batch()
        self._cache_next()
        return _Batch(batch)


class _Batch(_DefaultRecordBatchPy):  # type: ignore[misc]  # the client has no types
    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer: bytearray = _Lenient(self._buffer)


class _Lenient(bytearray):
    """Every part of it decodes to text; what is none gets backslashes."""

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        found = super().__getitem__(index)
        return _Lenient(found) if isinstance(found, bytearray) else found

    def decode(self, encoding: str = "utf-8", errors: str = "") -> str:
        return super().decode(encoding, "backslashreplace")
