"""The embedded broker as a :class:`~reliamq.spi.Backend`: opens the database and hands out its parts.

Making one does no I/O.  All parts of one process that name the same file share one connection and its group commit.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

import anyio

from reliamq.embedded.database import database_at
from reliamq.embedded.dead_letters import EmbeddedDeadLetters
from reliamq.embedded.publisher import EmbeddedPublisher
from reliamq.embedded.settings import locate
from reliamq.embedded.storage import EmbeddedStorage
from reliamq.embedded.subscription import EmbeddedSubscription, join
from reliamq.spi import Capabilities, ConfigurationError, DeadLetters, Durability, Publisher, Storage, Subscription

__all__ = ["FILE", "MEMORY", "EmbeddedBackend"]

FILE = Capabilities(durability=Durability.FSYNCED, networked=False, deduplicates=True)
MEMORY = Capabilities(
    durability=Durability.DEVELOPMENT,
    networked=False,
    survives_restart=False,
    shared_between_processes=False,
    deduplicates=True,
)


class EmbeddedBackend:
    """One broker, in a file or in this process's memory.

    clock: wall-clock seconds; only a test has another than ``time.time``.
    """

    name = "embedded"

    def __init__(
        self, url: str, settings: Mapping[str, object] | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        location = locate(url, settings or {})
        self.url = location.url
        self.capabilities = MEMORY if location.path is None else FILE
        self._database = database_at(location, clock)

    def __repr__(self) -> str:
        return f"<EmbeddedBackend {self.url}>"

    @asynccontextmanager
    async def storage(self) -> AsyncIterator[Storage]:
        """Open the means to declare and audit; see the contract.  A file that is missing is made by declaring alone."""
        async with AsyncExitStack() as stack:
            if not self._database.location.is_missing():
                await stack.enter_async_context(self._database.opened())
            yield EmbeddedStorage(self._database, self.capabilities.durability)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Open a publisher; see the contract."""
        async with self._database.opened():
            yield EmbeddedPublisher(self._database)

    @asynccontextmanager
    async def subscription(self, topic: str, group: str, *, lease: timedelta) -> AsyncIterator[Subscription]:
        """Join a declared group; see the contract.  Raises BrokerUnavailable when it is not declared."""
        if lease <= timedelta():
            raise ConfigurationError(f"group '{group}' on '{topic}': a lease of {lease} is over before it began")
        async with self._database.opened():
            member = await join(self._database, topic, group)
            subscription = EmbeddedSubscription(self._database, topic, group, member, lease)
            try:
                yield subscription
            finally:
                with anyio.CancelScope(shield=True):
                    await subscription.leave()

    @asynccontextmanager
    async def dead_letters(self) -> AsyncIterator[DeadLetters]:
        """Open the dead letters of all topics; see the contract."""
        async with self._database.opened():
            yield EmbeddedDeadLetters(self._database)
