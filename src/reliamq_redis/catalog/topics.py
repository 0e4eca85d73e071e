"""What a topic was declared with, and how its streams and groups are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from reliamq.spi import Durability, GroupSpec, TopicSpec
from reliamq_redis.catalog.names import LANE_COUNTS, TopicKeys, stream_of
from reliamq_redis.scripts import script
from reliamq_redis.wire.servers import Servers

__all__ = ["TopicFacts", "declare_topic", "groups_of", "make_group", "read_facts"]

DECLARE = script("declare_topic")


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """lanes: how many streams.  max_message_bytes, retention_seconds, durability: as the first declaration said."""

    lanes: int
    max_message_bytes: int
    retention_seconds: float
    durability: Durability

    @classmethod
    def asked(cls, spec: TopicSpec, lanes: int) -> TopicFacts:
        """Of a topic as an application needs it."""
        return cls(lanes, spec.max_message_bytes, spec.retention.total_seconds(), spec.durability)

    def fields(self) -> dict[str, str]:
        """As they are written."""
        return {
            "lanes": str(self.lanes),
            "max-message-bytes": str(self.max_message_bytes),
            "retention-seconds": str(self.retention_seconds),
            "durability": self.durability.name.lower(),
        }

    @classmethod
    def read(cls, answer: Sequence[bytes] | dict[bytes, bytes]) -> TopicFacts | None:
        """None where nothing is written.  Raises ValueError, KeyError for what no declaration wrote."""
        pairs = answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
        if not pairs:
            return None
        fields = {name.decode(): value.decode() for name, value in pairs.items()}
        lanes = int(fields["lanes"])
        if lanes not in LANE_COUNTS:
            raise ValueError(f"{lanes} lanes")
        durability = Durability[fields["durability"].upper()]
        return cls(lanes, int(fields["max-message-bytes"]), float(fields["retention-seconds"]), durability)


async def declare_topic(servers: Servers, topic: str, facts: TopicFacts, groups: Sequence[str]) -> TopicFacts:
    """Write them down unless the topic has some; those that it has."""
    keys, fields = TopicKeys(topic), [part for pair in facts.fields().items() for part in pair]
    answer = await servers.run(DECLARE, [keys.facts, keys.groups], [len(fields), *fields, *groups])
    return TopicFacts.read(answer) or facts


async def make_group(servers: Servers, topic: str, lanes: int, group: GroupSpec) -> None:
    """The streams, and the group on each; what is there stays as it is."""
    start = "0" if group.start == "earliest" else "$"
    for lane in range(lanes):
        stream = stream_of(topic, lane)
        try:
            await servers.call(stream, "XGROUP", "CREATE", stream, group.name, start, "MKSTREAM")
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise


async def read_facts(servers: Servers, topic: str) -> TopicFacts | None:
    """What the topic was declared with; None: it is not declared."""
    key = TopicKeys(topic).facts
    return TopicFacts.read(await servers.call(key, "HGETALL", key))


async def groups_of(servers: Servers, topic: str) -> frozenset[str]:
    """The names of the groups that were declared."""
    key = TopicKeys(topic).groups
    names: Any = await servers.call(key, "SMEMBERS", key)
    return frozenset(name.decode() for name in names)
