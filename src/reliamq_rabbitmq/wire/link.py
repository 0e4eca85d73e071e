"""A connection for publishing, made again when it has ended.

Publishing has connections of its own: a broker that sounds an alarm stops reading from those that publish, and then no
acknowledgement would reach it either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiormq.connection import Connection

from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, open_channel
from reliamq_rabbitmq.wire.connection import FAILURES, answered, close, connect, unavailable

__all__ = ["Link", "Linked", "is_blocked", "open_link"]

SILENT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Linked:
    """A connection and its channel with confirms, as they are now."""

    connection: Connection
    channel: Channel

    @property
    def is_alive(self) -> bool:
        """Whether it is worth trying; one that confirms nothing for long may be on a node without the others."""
        works = self.channel.lost is None and self.connection.is_opened
        return works and self.channel.silent_seconds < SILENT_SECONDS


class Link:
    """State of whoever opened it; its users ask for the channel each time."""

    def __init__(self, settings: RabbitmqSettings, purpose: str) -> None:
        self._settings, self._purpose = settings, purpose
        self._linked: Linked | None = None
        self._linking = asyncio.Lock()

    async def get(self, deadline: float) -> Linked:
        """The connection, made again if it has ended.  Raises BrokerUnavailable, also when the deadline passes.

        deadline: monotonic seconds.
        """
        if self._linked is not None and self._linked.is_alive:
            return self._linked
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._linking:
                if not await self._is_usable():
                    await self.close()
                    await self.open()
        except TimeoutError as error:
            raise unavailable(self._settings, "connecting by the deadline", error) from error
        if self._linked is None:
            raise AssertionError("opened a moment ago, in the same turn of the loop")
        return self._linked

    async def _is_usable(self) -> bool:
        """During an alarm it is silent for long, and what it holds would be read after what another one sends."""
        linked = self._linked
        if linked is None or linked.channel.lost is not None or not linked.connection.is_opened:
            return False
        return linked.is_alive or await is_blocked(linked.connection)

    async def open(self) -> None:
        """Connect.  Raises BrokerUnavailable.  Cancelled: nothing stays open."""
        connection = await connect(self._settings, self._purpose)
        try:
            channel = await answered(open_channel(connection, confirms=True), self._settings.request_timeout_seconds)
        except BaseException as error:
            await close(connection)
            if isinstance(error, FAILURES):
                raise unavailable(self._settings, "opening a channel", error) from error
            raise
        self._linked = Linked(connection, channel)

    async def close(self) -> None:
        """Close the connection.  Bounded."""
        linked, self._linked = self._linked, None
        if linked is not None:
            await close(linked.connection)


@asynccontextmanager
async def open_link(settings: RabbitmqSettings, purpose: str) -> AsyncIterator[Link]:
    """Connect and close.  Raises BrokerUnavailable."""
    link = Link(settings, purpose)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


async def is_blocked(connection: Connection) -> bool:
    """Whether the broker reads nothing from it, because memory or disk run short."""
    try:
        async with asyncio.timeout(0.01):
            await connection.ready()
    except TimeoutError:
        return True
    return False
