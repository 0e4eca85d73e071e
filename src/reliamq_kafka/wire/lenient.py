"""Reading what the client cannot: records with a header whose name is no UTF-8.

Kafka's protocol has text there, but no broker looks, and clients in C or Go write any bytes.  The client raises
UnicodeDecodeError for such a record whenever it comes to it, and what it had taken out of other partitions for the same
answer is gone.  So whoever reads goes on here, in all partitions from where it is, and leaves the rest to the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED, PartitionRecords
from aiokafka.errors import for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy

__all__ = ["Read", "read_leniently"]

LARGEST_ANSWER = 1024 * 1024
"""Bytes of one partition; a larger batch comes alone."""
FIRST_BATCH_FORMAT_WITH_HEADERS = 2
FORMAT = 16
"""Where it stands in a batch (Kafka protocol guide, record batch)."""


@dataclass(frozen=True, slots=True)
class Read:
    """records: the next ones of a partition, names that are no text with backslashes.  end: the offset behind them."""

    records: list[ConsumerRecord]
    end: int


async def read_leniently(
    consumer: AIOKafkaConsumer, offsets: Mapping[TopicPartition, int]
) -> dict[TopicPartition, Read]:
    """What each partition's leader has from an offset on, as far as one answer holds it; nothing is waited for.

    A partition without a leader is left out.  Raises KafkaError.
    """
    leaders = {part: consumer._client.cluster.leader_for_partition(part) for part in offsets}
    return {
        part: await _read(consumer, part, offsets[part], leader)
        for part, leader in leaders.items()
        if leader is not None and leader >= 0
    }


async def _read(consumer: AIOKafkaConsumer, part: TopicPartition, offset: int, leader: int) -> Read:
    isolation = READ_COMMITTED if consumer._isolation_level == "read_committed" else READ_UNCOMMITTED
    wanted = [(part.topic, [(part.partition, offset, LARGEST_ANSWER)])]
    answer = await consumer._client.send(leader, FetchRequest(0, 0, LARGEST_ANSWER, isolation, wanted))
    if not answer.topics:  # a broker that has its clients wait answers so
        return Read([], offset)
    ((_, ((_, code, _, *rest),)),) = answer.topics
    if code:
        raise for_code(code)()
    aborted = rest[2] if answer.API_VERSION >= 11 else rest[-2]  # of version 11 on something else is before the records
    read = PartitionRecords(part, _Batches(rest[-1]), aborted, offset, None, None, True, isolation)
    return Read(list(read), read.next_fetch_offset)


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
