"""What a publisher must know of a topic: its partitions, its size limit, and whether anybody would receive.

Asked once and kept; a topic without a group is asked for again, because groups come.  Partitions that are added later
are seen after a while: a key's messages then go elsewhere, which is why reliamq never adds any.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from reliamq_kafka.admin import Admin

__all__ = ["OVERHEAD_BYTES", "KnownTopics", "TopicFacts"]

OVERHEAD_BYTES = 16 * 1024
"""Room that a topic's limit has beyond the messages': attributes, record and batch headers."""
KEPT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """partitions: how many.  largest: bytes of a record batch.  groups: who would receive."""

    partitions: int
    largest: int
    groups: frozenset[str]
    asked_at: float

    @property
    def largest_message(self) -> int:
        """The largest :attr:`~reliamq.spi.Message.size` that fits with all that comes with it."""
        return max(0, self.largest - OVERHEAD_BYTES)


class KnownTopics:
    """Facts by topic, as old as a minute."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._known: dict[str, TopicFacts] = {}

    async def of(self, topic: str, *, group: str | None = None) -> TopicFacts | None:
        """The facts, or None without such a topic.  Raises BrokerUnavailable.

        group: ask again when it is not among those known.
        """
        facts = self._known.get(topic)
        is_new = facts is not None and time.monotonic() - facts.asked_at < KEPT_SECONDS
        if facts is not None and is_new and facts.groups and (group is None or group in facts.groups):
            return facts
        return await self._ask(topic)

    async def _ask(self, topic: str) -> TopicFacts | None:
        partitions = await self._admin.partitions(topic)
        if partitions is None:
            self._known.pop(topic, None)
            return None
        settings = await self._admin.topic_settings(topic)
        groups = (name.rpartition("@") for name in await self._admin.groups())
        facts = TopicFacts(
            partitions=len(partitions),
            largest=int(settings["max.message.bytes"]),
            groups=frozenset(group for group, _, of_topic in groups if of_topic == topic),
            asked_at=time.monotonic(),
        )
        self._known[topic] = facts
        return facts
