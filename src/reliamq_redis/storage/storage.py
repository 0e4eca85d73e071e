"""Safe shelter: declaring topics and groups.

Declaring creates what is missing and never weakens or deletes; what is there otherwise is left alone and said (S1).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

from reliamq.spi import Finding, Severity, TopicSpec
from reliamq_redis.audit.audit import audit
from reliamq_redis.catalog.topics import TopicFacts, declare_topic, make_group
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES
from reliamq_redis.wire.servers import Servers, open_servers, unavailable

__all__ = ["RedisStorage", "open_storage"]

NOT_LOWERED = "It was declared with more before, and declaring never lowers; nothing is lost."
LESS = "It was declared with less before, and stays so for everybody."
ALIKE = "Declare it with what every user of it needs."
DECLARE_ANEW = "Drain the topic, delete its key, and declare it again."


class RedisStorage:
    """A :class:`~reliamq.spi.Storage`."""

    def __init__(self, settings: RedisSettings, servers: Servers) -> None:
        self._settings, self._servers = settings, servers

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Create what is missing; see the contract."""
        findings: list[Finding] = []
        for spec in topics:
            try:
                findings += await self._declare(spec)
            except (*FAILURES, ValueError, KeyError) as error:
                raise unavailable(self._settings, f"declaring topic {spec.name}", error) from error
        return findings

    async def _declare(self, spec: TopicSpec) -> Sequence[Finding]:
        asked = TopicFacts.asked(spec, self._settings.lanes)
        facts = await declare_topic(self._servers, spec.name, asked, [group.name for group in spec.groups])
        for group in spec.groups:
            await make_group(self._servers, spec.name, facts.lanes, group)
        return list(differences(spec.name, facts, asked))

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Read the live values; see the contract."""
        try:
            return await audit(self._servers, self._settings, topics)
        except FAILURES as error:
            raise unavailable(self._settings, "auditing", error) from error


def differences(topic: str, facts: TopicFacts, asked: TopicFacts) -> Iterator[Finding]:
    """What was declared otherwise before."""
    pairs = (
        ("max_message_bytes", facts.max_message_bytes, asked.max_message_bytes, "What is larger is rejected."),
        ("retention", facts.retention_seconds, asked.retention_seconds, "A group that is new gets less of the past."),
        ("durability", facts.durability, asked.durability, "A confirmation promises less."),
    )
    for setting, found, wanted, less in pairs:
        if found != wanted:
            severity = Severity.RISKS if found < wanted else Severity.NOTE
            why, fix = (f"{LESS} {less}", DECLARE_ANEW) if found < wanted else (NOT_LOWERED, ALIKE)
            yield Finding(severity, f"topic {topic}", setting, _shown(found), _shown(wanted), why, fix, "S1")
    if facts.lanes != asked.lanes:
        why = "So many workers of a group can share the topic; nothing is lost."
        fix = "Ask for what is there: lanes that are added put keys out of order."
        yield Finding(Severity.NOTE, f"topic {topic}", "lanes", str(facts.lanes), str(asked.lanes), why, fix, "S1")


def _shown(value: object) -> str:
    return getattr(value, "name", str(value)).lower()


@asynccontextmanager
async def open_storage(settings: RedisSettings) -> AsyncIterator[RedisStorage]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_servers(settings) as servers:
        yield RedisStorage(settings, servers)
