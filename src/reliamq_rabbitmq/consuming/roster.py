"""Who is there: the members of a group on a topic tell one another, and so each knows its share of the lanes.

Only shares are agreed on here.  That no lane has two members at work is the broker's doing (single active consumer):
whoever was given a lane waits for it until the one before has let go.  So a roster that is wrong for a while costs time
and breaks nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from aiormq.connection import Connection

from reliamq_rabbitmq.catalog.names import members_exchange
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, ConnectionLost, Outgoing, Received, is_blocked
from reliamq_rabbitmq.wire.connection import FAILURES, answered, short_channel
from reliamq_rabbitmq.wire.frames import header_table, media_type
from reliamq_rabbitmq.wire.link import Linked

__all__ = ["Roster", "open_roster"]

logger = logging.getLogger("reliamq.rabbitmq")
BEAT_SECONDS = 1.0
"""With up to ten members; with more, each is heard less often, so that the broker does not carry more for it."""
MEMBERS_PER_BEAT = 10
MISSED_BEATS = 4
NO_HEADERS, JSON = header_table(()), media_type("application/json")


class Roster:
    """One member's view.

    channel: to hear on.  writer: to tell on.  changed: set whenever a share may be another.
    """

    def __init__(self, channel: Channel, writer: Linked, exchange: str, settings: RabbitmqSettings) -> None:
        self._channel, self._writer, self._exchange, self._settings = channel, writer, exchange, settings
        self._me = (time.time(), str(uuid.uuid4()))
        self._heard: dict[tuple[float, str], float] = {self._me: float("inf")}
        self._answer = asyncio.Event()
        self.changed = asyncio.Event()

    def share(self, lanes: int) -> frozenset[int]:
        """The lanes that are this member's."""
        members = sorted(self._heard)
        return frozenset(range(members.index(self._me), lanes, len(members)))

    def _hear(self, received: Received) -> None:
        try:
            word = json.loads(received.body)
            member, left = (float(word["since"]), str(word["id"])), bool(word["left"])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: a word that no member said: %r", self._exchange, error)
            return
        if member == self._me:
            return
        if left:
            gone = self._heard.pop(member, None)
            if gone is not None:
                self.changed.set()
            return
        if member not in self._heard:
            self._answer.set()  # so that the new one need not wait for the next beat
            self.changed.set()
        self._heard[member] = time.monotonic()

    @property
    def _beat(self) -> float:
        return BEAT_SECONDS * max(1.0, len(self._heard) / MEMBERS_PER_BEAT)

    async def run(self) -> None:
        """Tell the others, and forget who is silent, until cancelled.  Raises ConnectionLost."""
        while True:
            await self._say(left=False)
            self._answer.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._beat):
                    await self._answer.wait()
            if not await is_blocked(self._writer.connection):  # else nobody can be heard
                self._forget_silent()
            if lost := self._channel.lost or self._writer.channel.lost:
                raise ConnectionLost(f"the roster: {lost}")

    def _forget_silent(self) -> None:
        oldest = time.monotonic() - MISSED_BEATS * self._beat
        for member in [member for member, heard in self._heard.items() if heard < oldest]:
            del self._heard[member]
            self.changed.set()

    async def _say(self, *, left: bool) -> None:
        # Not confirmed in time: the broker reads nothing just now, or its others are gone; who hears nothing will do
        # without this member for a while, and waits for its lanes in vain
        word = json.dumps({"since": self._me[0], "id": self._me[1], "left": left}).encode()
        outgoing = Outgoing(self._exchange, "", JSON, NO_HEADERS, word)
        await self._writer.channel.publish([outgoing], deadline=time.monotonic() + self._beat)

    async def join(self) -> None:
        """Hear the others from now on."""
        seconds = self._settings.request_timeout_seconds
        queue = f"reliamq.member-{self._me[1]}"
        await answered(self._channel.queue_declare(queue, exclusive=True, auto_delete=True), seconds)
        await answered(self._channel.queue_bind(queue, self._exchange), seconds)
        await answered(self._channel.listen(queue, deliver=self._hear, cancelled=self.changed.set), seconds)

    async def leave(self) -> None:
        """Let the others know."""
        with suppress(*FAILURES):
            await self._say(left=True)


@asynccontextmanager
async def open_roster(
    connection: Connection, writer: Linked, settings: RabbitmqSettings, topic: str, group: str
) -> AsyncIterator[Roster]:
    """Be heard of while the block runs.  Raises TimeoutError, the client's errors."""
    async with short_channel(connection, settings) as channel:
        roster = Roster(channel, writer, members_exchange(topic, group), settings)
        await roster.join()
        try:
            yield roster
        finally:
            await roster.leave()
