"""Redis or Valkey as a :class:`~reliamq.spi.Backend`: hands out its parts; making one does no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from datetime import timedelta

from reliamq.spi import (
    Capabilities,
    ConfigurationError,
    DeadLetters,
    Durability,
    Publisher,
    Storage,
    Subscription,
)
from reliamq_redis.catalog.dead_letters import open_dead_letters
from reliamq_redis.consuming.subscription import open_subscription
from reliamq_redis.publisher import open_publisher
from reliamq_redis.settings import read_settings
from reliamq_redis.storage.storage import open_storage

__all__ = ["CAPABILITIES", "RedisBackend"]

CAPABILITIES = Capabilities(durability=Durability.REPLICATED, networked=True)


class RedisBackend:
    """One primary with its replicas, or one Cluster."""

    name = "redis"
    capabilities = CAPABILITIES

    def __init__(self, url: str, settings: Mapping[str, object] | None = None) -> None:
        self._settings = read_settings(url, settings or {})
        self.url = self._settings.url

    def __repr__(self) -> str:
        return f"<RedisBackend {self.url}>"

    def storage(self) -> AbstractAsyncContextManager[Storage]:
        """Open the means to declare and audit; see the contract."""
        return open_storage(self._settings)

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """Open a publisher; see the contract."""
        return open_publisher(self._settings)

    def subscription(self, topic: str, group: str, *, lease: timedelta) -> AbstractAsyncContextManager[Subscription]:
        """Join a declared group; see the contract."""
        if lease <= timedelta():
            raise ConfigurationError(f"group '{group}' on '{topic}': a lease of {lease} is over before it began")
        return open_subscription(self._settings, topic, group, lease)

    def dead_letters(self) -> AbstractAsyncContextManager[DeadLetters]:
        """Open the dead letters of all topics; see the contract."""
        return open_dead_letters(self._settings)
