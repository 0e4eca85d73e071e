"""A connection for publishing and its channels, made again when they have ended.

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

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import keep_until_it_ends
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import SILENT_SECONDS, Channel, is_blocked, open_channel
from reliamq_rabbitmq.wire.connection import FAILURES, answered, close, close_channel, connect, unavailable

__all__ = ["Link", "Linked", "open_link"]

RENEWED_SECONDS = 60.0
"""How long a channel that was replaced is kept for what is outstanding on it."""


@dataclass(frozen=True, slots=True)
class Linked:
    """A connection and one of its channels with confirms, as they are now."""

    connection: Connection
    channel: Channel

    @property
    def is_alive(self) -> bool:
        """Whether it is worth trying; one that confirms nothing for long may be on a node without the others."""
        works = self.channel.lost is None and self.connection.is_opened
        return works and self.channel.silent_seconds < SILENT_SECONDS


class Link:
    """State of whoever opened it; its users ask for a channel each time.

    channels: how many there are, numbered from 0, from the start: during an alarm none can be opened.
    """

    def __init__(self, settings: RabbitmqSettings, purpose: str, *, channels: int = 1) -> None:
        self._settings, self._purpose, self._channels = settings, purpose, channels
        self._connection: Connection | None = None
        self._linked: dict[int, Linked] = {}
        self._linking = asyncio.Lock()

    async def get(self, deadline: float, number: int = 0) -> Linked:
        """The connection and the channel of that number, made again if they have ended.

        Raises BrokerUnavailable, also when the deadline passes.  deadline: monotonic seconds.
        """
        linked = self._linked.get(number)
        if linked is not None and linked.is_alive:
            return linked
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._linking:
                if not await self._is_usable(number):
                    await self._link(number)
        except TimeoutError as error:
            raise unavailable(self._settings, "connecting by the deadline", error) from error
        return self._linked[number]  # opened a moment ago, in the same turn of the loop

    async def _is_usable(self, number: int) -> bool:
        """During an alarm it is silent for long, and what it holds would be read after what another one sends."""
        linked = self._linked.get(number)
        if linked is None or linked.channel.lost is not None or not linked.connection.is_opened:
            return False
        return linked.is_alive or await is_blocked(linked.connection)

    async def _link(self, number: int) -> None:
        """Open the channel again, or all on a new connection where the old one has ended or answers nothing."""
        silent = number in self._linked and self._linked[number].channel.lost is None
        if silent or self._connection is None or not self._connection.is_opened:
            await self.close()
            await self.open()
            return
        try:
            await self._open_channel(self._connection, number)
        except BrokerUnavailable:
            await self.close()  # it answers nothing
            raise

    async def open(self) -> None:
        """Connect.  Raises BrokerUnavailable.  Cancelled: nothing stays open."""
        connection = await connect(self._settings, self._purpose)
        try:
            await asyncio.gather(*[self._open_channel(connection, number) for number in range(self._channels)])
        except BaseException:
            await close(connection)
            raise
        self._connection = connection

    async def _open_channel(self, connection: Connection, number: int) -> None:
        try:
            channel = await answered(open_channel(connection, confirms=True), self._settings.request_timeout_seconds)
        except FAILURES as error:
            raise unavailable(self._settings, "opening a channel", error) from error
        self._linked[number] = Linked(connection, channel)

    def renew(self, number: int, channel: Channel) -> None:
        """Have the next user of that number get a new channel; this one is closed when nothing is outstanding on it.

        A node's channel keeps to the leader that a queue had when it published there first, and refuses everything
        while that one is frozen (RabbitMQ 3.10), although there is a new one.
        """
        linked = self._linked.get(number)
        if linked is not None and linked.channel is channel:
            del self._linked[number]
            keep_until_it_ends(asyncio.ensure_future(_close_when_idle(channel)))

    async def close(self) -> None:
        """Close the connection.  Bounded."""
        connection, self._connection = self._connection, None
        self._linked.clear()
        if connection is not None:
            await close(connection)


async def _close_when_idle(channel: Channel) -> None:
    await channel.idle(RENEWED_SECONDS)
    await close_channel(channel)


@asynccontextmanager
async def open_link(settings: RabbitmqSettings, purpose: str, *, channels: int = 1) -> AsyncIterator[Link]:
    """Connect and close.  Raises BrokerUnavailable."""
    link = Link(settings, purpose, channels=channels)
    await link.open()
    try:
        yield link
    finally:
        await link.close()
