"""Safe shelter: declaring topics and groups.

Declaring creates what is missing and never weakens or deletes; what is there otherwise is left alone and said (S1).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from redis.exceptions import OutOfMemoryError

from reliamq.spi import Finding, Severity, TopicSpec
from reliamq_redis.audit.audit import audit
from reliamq_redis.audit.differences import differences
from reliamq_redis.catalog.topics import TopicFacts, declare_topic, make_group
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES, said
from reliamq_redis.wire.servers import Servers, open_servers, unavailable

__all__ = ["RedisStorage", "open_storage"]


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
            except OutOfMemoryError as error:
                findings.append(_no_room(spec, error))
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


def _no_room(spec: TopicSpec, error: BaseException) -> Finding:
    """The server is there and refuses, so that waiting for it is not the answer."""
    why = "What is missing of it cannot be made, and nothing can be published."
    fix = "Let groups catch up, or raise maxmemory; then declare again."
    found = f"refused ({said(error)})"
    return Finding(Severity.LOSES, f"topic {spec.name}", "declaration", found, "room in memory", why, fix, "S1")


@asynccontextmanager
async def open_storage(settings: RedisSettings) -> AsyncIterator[RedisStorage]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_servers(settings) as servers:
        yield RedisStorage(settings, servers)
