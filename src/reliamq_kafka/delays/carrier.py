"""Stores delayed records in their next place: another wait, or home.

It decides where that is, and calls stored only what is confirmed there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError

from reliamq.spi import BrokerUnavailable, Confirmation
from reliamq_kafka.catalog.groups import Groups
from reliamq_kafka.catalog.topics import KnownTopics, TopicFacts
from reliamq_kafka.delays.delayed import Delayed, due_at, original, returning
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin
from reliamq_kafka.wire.lines import Addressed, Lines
from reliamq_kafka.wire.partition_queue import Sending
from reliamq_kafka.wire.records import hash_of

__all__ = ["Carrier", "open_carrier"]

logger = logging.getLogger("reliamq.kafka")
Address = tuple[str, str]
"""Topic and group."""
TURNED_AWAY_SECONDS = 64
"""How long a record waits whose topic does not take it, before it is tried again."""


class Carrier:
    """name: of the topic of delays, which is there."""

    def __init__(self, admin: Admin, settings: KafkaSettings, lines: Lines, topics: KnownTopics, name: str) -> None:
        self._admin, self._settings, self._lines = admin, settings, lines
        self._topics, self._name = topics, name
        self._partitions = self._turn = 0

    async def carry(self, records: Sequence[ConsumerRecord], now: float) -> Sequence[bool]:
        """Store each in its next place; whether it is there, in order.

        One that its topic does not take (there is no such topic or group any more, too few replicas, no answer in
        time) waits once more, so that it holds up nobody.  One that nobody of ours postponed is left out, and said.
        Raises BrokerUnavailable when none could be tried.  Cancelled: any of them may be stored.
        now: seconds of the wall clock.
        """
        self._partitions = self._partitions or len(await self._admin.led_partitions(self._name))
        began = time.monotonic()
        delayed = {place: one for place, record in enumerate(records) if (one := _read(record, now)) is not None}
        facts = await self._all_facts({(one.topic, one.group) for one in delayed.values() if not one.left}, began)
        ways = {place: self._way(records[place], one, facts) for place, one in delayed.items()}
        stored = await self._send(ways)
        turned_away = {
            place: self._wait(records[place], replace(delayed[place], left=TURNED_AWAY_SECONDS))
            for place, way in ways.items()
            if place not in stored and way.topic != self._name
        }
        stored |= await self._send(turned_away)
        return [place in stored or place not in delayed for place in range(len(records))]

    async def _send(self, ways: Mapping[int, Addressed]) -> set[int]:
        """Which of them are stored."""
        deadline = time.monotonic() + self._settings.request_timeout_seconds
        outcomes = await self._lines.send(list(ways.values()), deadline=deadline)
        missing = [outcome for outcome in outcomes if not isinstance(outcome, Confirmation)]
        if missing:
            logger.warning("%s: %d records not confirmed, the first: %s", self._name, len(missing), missing[0])
        return {place for place, one in zip(ways, outcomes, strict=True) if isinstance(one, Confirmation)}

    # --- where to --------------------------------------------------------------------------------------------------

    def _way(self, record: ConsumerRecord, delayed: Delayed, known: Mapping[Address, TopicFacts | None]) -> Addressed:
        if delayed.left:
            return self._wait(record, delayed)
        facts = known[delayed.topic, delayed.group]
        if facts is None:
            return self._wait(record, replace(delayed, left=TURNED_AWAY_SECONDS))
        return self._home(record, delayed, facts)

    async def _all_facts(self, addresses: Collection[Address], began: float) -> Mapping[Address, TopicFacts | None]:
        """Side by side, so that one topic that nobody answers for holds up no other.  None: it takes nothing now."""
        found: dict[Address, TopicFacts | None] = {}

        async def look_up(address: Address) -> None:
            found[address] = await self._facts(*address, began)

        async with anyio.create_task_group() as tasks:
            for address in addresses:
                tasks.start_soon(look_up, address)
        return found

    async def _facts(self, topic: str, group: str, began: float) -> TopicFacts | None:
        try:
            deadline = began + self._settings.request_timeout_seconds
            facts = await self._topics.of(topic, group=group, since=began, deadline=deadline)
        except (KafkaError, BrokerUnavailable) as error:  # not permitted, no answer: it must not hold up others
            why = f"cannot be looked up: {error!r}"
        else:
            if facts is not None and group in facts.groups:
                return facts
            why = "is not declared"
        logger.warning(
            "%s: group '%s' of topic '%s' %s; what is for it waits another %d s",
            *(self._name, group, topic, why, TURNED_AWAY_SECONDS),
        )
        return None

    def _wait(self, record: ConsumerRecord, delayed: Delayed) -> Addressed:
        number, then = delayed.into(self._partitions)
        headers = [*original(record.headers), *then.headers()]
        return Addressed(self._name, number, _sending(record, headers))

    def _home(self, record: ConsumerRecord, delayed: Delayed, facts: TopicFacts) -> Addressed:
        number = self._partition(record.key, facts.partitions)
        return Addressed(delayed.topic, number, _sending(record, returning(record.headers, delayed)), facts.largest)

    def _partition(self, key: bytes | None, count: int) -> int:
        """The one to which publishers send the key."""
        if key is None:
            self._turn += 1
            return self._turn % count
        return hash_of(key) % count


def _sending(record: ConsumerRecord, headers: list[tuple[str, bytes]]) -> Sending:
    return Sending(f"{record.partition}/{record.offset}", record.key, record.value, headers)


def _read(record: ConsumerRecord, now: float) -> Delayed | None:
    """For whom it waited, and what is left of that; None for what nobody of ours postponed."""
    try:
        delayed = Delayed.read(record.headers)
    except (KeyError, ValueError) as error:
        place = f"{record.topic} {record.partition}/{record.offset}"
        logger.error("%s: nobody of reliamq postponed this record, it is left out: %r", place, error)
        return None
    return delayed.late(now - due_at(record.partition, record.timestamp))


@asynccontextmanager
async def open_carrier(admin: Admin, settings: KafkaSettings, lines: Lines, name: str) -> AsyncIterator[Carrier]:
    """Stops asking for topics at the end.  name: of the topic of delays, which is there."""
    topics = KnownTopics(admin, Groups(admin, settings))
    try:
        yield Carrier(admin, settings, lines, topics, name)
    finally:
        await topics.close()
