"""The audit."""

from __future__ import annotations

from collections.abc import Sequence

from aiormq.connection import Connection

from reliamq.spi import Finding, TopicSpec
from reliamq_rabbitmq.settings import RabbitmqSettings

__all__ = ["audit"]


async def audit(connection: Connection, settings: RabbitmqSettings, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
    """Read the live values and say what falls short (S2)."""
    return ()
