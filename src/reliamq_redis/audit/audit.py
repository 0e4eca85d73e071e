"""Reads the live servers."""

from __future__ import annotations

from collections.abc import Sequence

from reliamq.spi import Finding, TopicSpec
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.servers import Servers

__all__ = ["audit"]


async def audit(servers: Servers, settings: RedisSettings, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
    """What falls short; see the contract of ``Storage.audit``."""
    return []
