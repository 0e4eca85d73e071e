"""Leases and locks at a URL, as the core asks for them.

Servers that would lose what they were told are refused when they are opened, by the rules of the audit, which looks at
them only where they are the broker's, too.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta

from reliamq.spi import Durability, DurabilityError, Severity
from reliamq_redis.audit.commands import Commands
from reliamq_redis.audit.questions import ask_server
from reliamq_redis.audit.rules import findings_of
from reliamq_redis.audit.server import primary_faults
from reliamq_redis.leases.connections import Connections
from reliamq_redis.leases.lock import RedisLock
from reliamq_redis.leases.steps import LeaseSteps
from reliamq_redis.leases.store import RedisLeaseStore
from reliamq_redis.settings import read_settings
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
        settings, commands = self._settings, Commands(self._settings)
        try:
            told = [await ask_server(servers, settings, address) for address in await servers.holders()]
        except FAILURES as error:
            raise unavailable(settings, "looking at what keeps leases", error) from error
        faults = [(one.name, fault) for one in told for fault in primary_faults(one, self._durability, commands)]
        findings = list(findings_of("leases on server", faults))
        losing = [finding for finding in findings if finding.severity is Severity.LOSES]
        if losing and self._durability > Durability.DEVELOPMENT:
            raise DurabilityError(losing)
        for finding in findings:
            if finding.severity is not Severity.NOTE:
                logger.warning("%s: %s", finding.severity, finding)
