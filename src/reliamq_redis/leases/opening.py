"""Leases and locks at a URL, as the core asks for them.

Servers on which marks could get lost without a failure are refused when they are opened, whatever broker there is: no
other audit looks at them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from reliamq.spi import Durability, DurabilityError, Finding, Severity
from reliamq_redis.leases.connections import Connections
from reliamq_redis.leases.lock import RedisLock
from reliamq_redis.leases.steps import LeaseSteps
from reliamq_redis.leases.store import RedisLeaseStore
from reliamq_redis.settings import RedisSettings, read_settings
from reliamq_redis.wire.errors import FAILURES
from reliamq_redis.wire.servers import Servers, open_servers, unavailable

__all__ = ["RedisLeases"]

logger = logging.getLogger("reliamq.redis")
LOCKS_REMEMBERED = timedelta(days=14)
"""After a lock was held last.  Its tokens grow beyond that, with time."""


class RedisLeases:
    """A :class:`~reliamq.spi.Leases`.

    durability: what a lease and a mark must survive.  ``replicated``: they are with as many replicas as the settings
    say; ``fsynced``: on the primary's disk; ``development``: with the primary.
    """

    def __init__(self, url: str, settings: Mapping[str, object], durability: Durability) -> None:
        self._settings, self._durability = read_settings(url, settings), durability

    def __repr__(self) -> str:
        return f"<RedisLeases {self._settings.url}>"

    @asynccontextmanager
    async def idempotency_store(self, *, remember: timedelta) -> AsyncIterator[RedisLeaseStore]:
        """Open the store of leases; see the contract."""
        async with self._steps(remember) as steps:
            yield RedisLeaseStore(steps)

    @asynccontextmanager
    async def lock(self) -> AsyncIterator[RedisLock]:
        """Open the locks; see the contract."""
        async with self._steps(LOCKS_REMEMBERED) as steps:
            yield RedisLock(steps)

    @asynccontextmanager
    async def _steps(self, remember: timedelta) -> AsyncIterator[LeaseSteps]:
        async with open_servers(self._settings) as servers:
            await self._check(servers)
            connections = Connections(self._settings, servers, self._durability)
            try:
                yield LeaseSteps(connections, remember=remember)
            finally:
                await connections.close()

    async def _check(self, servers: Servers) -> None:
        """Raises DurabilityError, BrokerUnavailable."""
        findings: list[Finding] = []
        try:
            for host, port in await servers.holders():
                client: Any = servers.client((host, port))
                async with asyncio.timeout(self._settings.request_timeout_seconds):
                    info = await client.execute_command("INFO")
                findings += _shortcomings(f"leases on {host}:{port}", info, self._settings, self._durability)
        except FAILURES as error:
            raise unavailable(self._settings, "looking at the servers", error) from error
        losing = [finding for finding in findings if finding.severity is Severity.LOSES]
        if losing and self._durability > Durability.DEVELOPMENT:
            raise DurabilityError(losing)
        for finding in findings:
            logger.warning("%s: %s", finding.severity, finding)


def _shortcomings(
    subject: str, info: Mapping[str, Any], settings: RedisSettings, durability: Durability
) -> Iterator[Finding]:
    """Of a primary, by what it says of itself."""
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and info.get("maxmemory"):
        why = "When memory runs short the server removes marks, and their effects are produced again."
        fix = "CONFIG SET maxmemory-policy noeviction"
        yield Finding(Severity.LOSES, subject, "maxmemory-policy", str(policy), "noeviction", why, fix, "I5")
    if not info.get("aof_enabled"):
        why = "A server that starts again has forgotten leases and marks since its last snapshot."
        fix = "CONFIG SET appendonly yes, and the same in its configuration file."
        yield Finding(Severity.LOSES, subject, "appendonly", "no", "yes", why, fix, "I3")
    replicas = settings.replicas if durability is Durability.REPLICATED else 0
    found = info.get("connected_slaves", 0)
    if found < replicas:
        why = "Nothing is granted until more are connected."
        fix = "Start the replicas, or lower 'replicas' in the URL or the section."
        yield Finding(Severity.RISKS, subject, "connected replicas", str(found), str(replicas), why, fix, "I3")
