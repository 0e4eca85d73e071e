"""What a publisher must know of a topic: its partitions, its size limit, and whether anybody would receive.

Asked once and kept; a topic or a group that is not known is asked for again by the next batch, because it may have been
declared since.  Partitions that are added later are seen after a while: a key's messages then go elsewhere, which is
why reliamq never adds any.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from reliamq_kafka.admin import Admin, Partition
from reliamq_kafka.groups import Groups

__all__ = ["OVERHEAD_BYTES", "KnownTopics", "TopicFacts"]

OVERHEAD_BYTES = 16 * 1024
"""Room that a topic's limit has beyond the messages': attributes, record and batch headers."""
KEPT_SECONDS = 60.0
SEEN_SECONDS = 2.0
"""How long a broker may take to hear of a topic that was declared."""
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """partitions: how many.  largest: bytes of a record batch.  groups: who would receive."""

    partitions: int
    largest: int
    groups: frozenset[str]

    @property
    def largest_message(self) -> int:
        """The largest :attr:`~reliamq.spi.Message.size` that fits with all that comes with it."""
        return max(0, self.largest - OVERHEAD_BYTES)

    def serves(self, group: str | None) -> bool:
        """Whether somebody would receive: that group, or any at all."""
        return group in self.groups if group is not None else bool(self.groups)


@dataclass(frozen=True, slots=True)
class Answer:
    """facts: None when there was no such topic."""

    facts: TopicFacts | None
    asked_at: float


class KnownTopics:
    """Facts by topic, as old as a minute."""

    def __init__(self, admin: Admin, groups: Groups) -> None:
        self._admin, self._groups = admin, groups
        self._known: dict[str, Answer] = {}

    async def of(self, topic: str, *, group: str | None = None, since: float) -> TopicFacts | None:
        """The facts, or None without such a topic.  Raises BrokerUnavailable.

        group: whom the message is for, if not for all.
        since: monotonic seconds; that somebody is not there counts only if it was found out after that.
        """
        known = self._known.get(topic)
        if known is not None:
            served = known.facts is not None and known.facts.serves(group)
            if known.asked_at > (time.monotonic() - KEPT_SECONDS if served else since):
                return known.facts
        facts = await self._ask(topic)
        self._known[topic] = Answer(facts, time.monotonic())
        return facts

    async def _ask(self, topic: str) -> TopicFacts | None:
        groups = frozenset(each.group for each in await self._groups.of(topic))
        partitions = await self._partitions(topic, SEEN_SECONDS if groups else 0.0)
        if partitions is None:
            return None
        settings = await self._admin.topic_settings(topic)
        return TopicFacts(len(partitions), int(settings["max.message.bytes"]), groups)

    async def _partitions(self, topic: str, patience: float) -> Sequence[Partition] | None:
        deadline = time.monotonic() + patience
        while True:
            partitions = await self._admin.partitions(topic)
            if partitions is not None or time.monotonic() >= deadline:
                return partitions
            await asyncio.sleep(PAUSE_SECONDS)
