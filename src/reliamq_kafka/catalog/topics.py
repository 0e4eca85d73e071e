"""What a publisher must know of a topic: its partitions, its size limit, and whether anybody would receive.

Asked once and kept; a topic or a group that is not known is asked for again by the next batch, because it may have been
declared since.  Partitions that are added later are seen after a while: a key's messages then go elsewhere, which is
why reliamq never adds any.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from reliamq_kafka.catalog.groups import Groups
from reliamq_kafka.wire.admin import Admin, Partition
from reliamq_kafka.wire.consumers import ANSWER_SECONDS

__all__ = ["OVERHEAD_BYTES", "KnownTopics", "TopicFacts"]

OVERHEAD_BYTES = 16 * 1024
"""Room that a topic's limit has beyond the messages': attributes, record and batch headers."""
KEPT_SECONDS = 60.0
SEEN_SECONDS = 2.0
"""How long a broker may take to hear of a topic that was declared."""
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """partitions: how many.  largest: bytes of a record batch.  groups: who would receive.

    largest_message: the largest :attr:`~reliamq.spi.Message.size` that fits with all that comes with it.
    """

    partitions: int
    largest: int
    groups: frozenset[str]
    largest_message: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest_message", max(0, self.largest - OVERHEAD_BYTES))  # every message asks for it

    def serves(self, group: str | None) -> bool:
        """Whether somebody would receive: that group, or any at all."""
        return group in self.groups if group is not None else bool(self.groups)


@dataclass(frozen=True, slots=True)
class Answer:
    """facts: None when there was no such topic."""

    facts: TopicFacts | None
    asked_at: float


class KnownTopics:
    """Facts by topic, as old as a minute; older ones serve until there are newer."""

    def __init__(self, admin: Admin, groups: Groups) -> None:
        self._admin, self._groups = admin, groups
        self._known: dict[str, Answer] = {}
        self._asking: dict[str, tuple[asyncio.Task[TopicFacts | None], float]] = {}

    async def of(
        self, topic: str, *, group: str | None = None, since: float, deadline: float = inf
    ) -> TopicFacts | None:
        """The facts, or None without such a topic.

        Raises BrokerUnavailable, also when the deadline passes; KafkaError where the cluster refuses to say.

        group: whom the message is for, if not for all.
        since: monotonic seconds; that somebody is not there counts only if it was found out after that.
        """
        known = self._known.get(topic)
        if known is not None:
            if known.facts is not None and known.facts.serves(group):
                if time.monotonic() - known.asked_at > KEPT_SECONDS:
                    self._ask(topic)
                return known.facts
            if known.asked_at > since:
                return known.facts
        while True:
            asking, began = self._ask(topic)
            # Cancelled here: whoever asks next finds the answer.
            await asyncio.wait({asking}, timeout=min(max(0.0, deadline - time.monotonic()), ANSWER_SECONDS))
            if not asking.done():
                raise self._admin.unavailable(f"topic '{topic}' cannot be looked up by the deadline")
            facts = asking.result()
            if began > since or (facts is not None and facts.serves(group)):
                return facts  # else it was asked before: somebody may have been declared since

    async def preload(self) -> Mapping[str, int]:
        """How many partitions each declared topic has.  Raises BrokerUnavailable."""
        return await self._admin.partition_counts(list(await self._groups.all()))

    def _ask(self, topic: str) -> tuple[asyncio.Task[TopicFacts | None], float]:
        """Have it asked for; one question at a time about one topic.  And when that began."""
        found = self._asking.get(topic)
        if found is not None:
            return found
        began = time.monotonic()
        asking = asyncio.create_task(self._answer(topic), name=f"looking up {topic}")
        asking.add_done_callback(lambda done: self._asked(topic, done, began))
        self._asking[topic] = asking, began
        return asking, began

    def _asked(self, topic: str, asking: asyncio.Task[TopicFacts | None], began: float) -> None:
        del self._asking[topic]
        if not asking.cancelled() and asking.exception() is None:  # else what is known serves on
            self._known[topic] = Answer(asking.result(), began)

    async def _answer(self, topic: str) -> TopicFacts | None:
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

    async def close(self) -> None:
        """Stop asking."""
        asking = {task for task, _ in self._asking.values()}
        for task in asking:
            task.cancel()
        if asking:
            await asyncio.wait(asking)
