"""A quorum queue used as a small set of records that one reader holds at a time.

Its single active consumer makes whoever reads it the only one who does, and hands it to the next reader whole, in
order, when this one is gone.  That everything was read is known by a *knock*: a record that the reader writes itself,
and that comes after all the others.  It promises that a record written and confirmed is read by every later reader
until it is removed.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aiormq.connection import Connection

from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, ConnectionLost, Fate, Outgoing, Received
from reliamq_rabbitmq.wire.connection import answered, short_channel
from reliamq_rabbitmq.wire.frames import header_table, media_type

__all__ = ["Journal", "open_journal"]

KNOCK, KNOCKED_AT = "reliamq-knock", "reliamq-knocked-at"
KNOCK_SECONDS = 30.0
"""How often a reader that waits knocks again."""
STALE_SECONDS = 4 * KNOCK_SECONDS
"""After which another reader's knock is removed: it has gone, or knocked again."""
FORGOTTEN_SECONDS = 3600.0
"""After which, by the wall clock of who knocked, it is removed by whoever sees it."""
MOST_RECORDS = 65_535
"""That one reader can hold (AMQP 0-9-1, basic.qos: prefetch-count is a short)."""
JSON, DEFAULT_EXCHANGE = media_type("application/json"), ""


class Journal:
    """One reader.

    channel: its consumer's.  writer: a channel with confirms, of a connection that may publish.
    came: called with each record, in order, those that this reader writes included; never with a knock.
    lost: set when this reader is it no more.
    """

    def __init__(self, channel: Channel, writer: Channel, queue: str, came: Callable[[Received], None]) -> None:
        self._channel, self._writer, self._queue, self._came = channel, writer, queue, came
        self._knock = ""
        self._knocks: dict[int, float] = {}  # of other readers, and since when they are here
        self._done: list[int] = []  # knocks to remove
        self._news = asyncio.Event()
        self._heard = False
        self.lost = asyncio.Event()

    async def open(self) -> None:
        """Take one's place among the readers.  Raises the client's errors."""
        await self._channel.consume(self._queue, prefetch=MOST_RECORDS, deliver=self._take, cancelled=self._end)

    async def read_all(self) -> None:
        """Wait for one's turn and for all that was written before it, however long.  Raises ConnectionLost.

        That a knock comes back says that it is one's turn.  Whoever had it before may have held that knock, and written
        more behind it; so another one is sent, behind all that.
        """
        for _ in ("one's turn", "all of it"):
            await self._knock_until_heard()
        await self.tidy()

    async def _knock_until_heard(self) -> None:
        self._knock, self._heard, knocked_at = str(uuid.uuid4()), False, float("-inf")
        while not self._heard:
            if self.lost.is_set():
                raise self._failure()
            if time.monotonic() - knocked_at > KNOCK_SECONDS:
                knocked_at = time.monotonic()
                header = header_table([(KNOCK, self._knock), (KNOCKED_AT, str(time.time()))])
                await self.write([(header, b"")], deadline=knocked_at + KNOCK_SECONDS)
            else:
                await self._wait(KNOCK_SECONDS)

    async def read_until_quiet(self, seconds: float) -> None:
        """Read what comes while nothing can be written, until nothing more comes for so long.

        Another reader may still have its turn; it must be read again, whole, before anything is removed.
        """
        quiet_since = time.monotonic()
        while (left := quiet_since + seconds - time.monotonic()) > 0:
            if self.lost.is_set():
                raise self._failure()
            if await self._wait(left):
                quiet_since = time.monotonic()

    async def renew(self, tags: Sequence[int]) -> None:
        """Have records come again at once, with other tags."""
        for tag in tags:
            await self._channel.requeue(tag)

    async def _wait(self, seconds: float) -> bool:
        """Whether something came in that time."""
        self._news.clear()
        if self.lost.is_set():
            return True
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def write(self, records: Sequence[tuple[bytes, bytes]], *, deadline: float) -> Sequence[Fate]:
        """Write records: encoded headers and body each.  They come to this reader too, later."""
        outgoing = [Outgoing(DEFAULT_EXCHANGE, self._queue, JSON, headers, body) for headers, body in records]
        return await self._writer.publish(outgoing, deadline=deadline)

    async def remove(self, tags: Sequence[int]) -> None:
        """Remove records by the tags that they came with."""
        await self._channel.ack(tags)

    async def tidy(self) -> None:
        """Remove knocks that are answered or that nobody waits for."""
        stale = [tag for tag, since in self._knocks.items() if time.monotonic() - since > STALE_SECONDS]
        for tag in stale:
            del self._knocks[tag]
        done, self._done = [*self._done, *stale], []
        if done:
            await self._channel.ack(done)

    async def flush(self) -> None:
        """Wait until the broker has heard of what was removed."""
        await self._channel.flush(MOST_RECORDS)

    def _take(self, received: Received) -> None:
        knock = received.headers.get(KNOCK)
        if knock is None:
            self._came(received)
        elif knock == self._knock:
            self._heard = True
            self._done.append(received.tag)
        elif _age(received) > FORGOTTEN_SECONDS:
            self._done.append(received.tag)
        else:
            self._knocks[received.tag] = time.monotonic()
        self._news.set()

    def _end(self) -> None:
        self.lost.set()
        self._news.set()

    def _failure(self) -> ConnectionLost:
        return ConnectionLost(f"{self._queue}: {self._channel.lost or 'the queue is gone, or its leader'}")


def _age(received: Received) -> float:
    at = received.headers.get(KNOCKED_AT)
    try:
        return time.time() - float(at) if isinstance(at, str) else 0.0
    except ValueError:
        return 0.0


@asynccontextmanager
async def open_journal(
    connection: Connection,
    settings: RabbitmqSettings,
    queue: str,
    came: Callable[[Received], None],
    writer: Channel | None = None,
) -> AsyncIterator[Journal]:
    """Be among the readers; leaving lets the next one read.  Raises TimeoutError, the client's errors.

    writer: of another connection, for who must go on reading while nothing can be written.
    """
    async with short_channel(connection, settings, confirms=writer is None) as channel:
        journal = Journal(channel, writer or channel, queue, came)
        await answered(journal.open(), settings.request_timeout_seconds)
        yield journal
