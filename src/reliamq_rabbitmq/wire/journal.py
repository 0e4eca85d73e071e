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
from reliamq_rabbitmq.wire.connection import short_channel
from reliamq_rabbitmq.wire.frames import header_table, media_type

__all__ = ["Journal", "open_journal"]

KNOCK = "reliamq-knock"
STALE_SECONDS = 600.0
JSON, DEFAULT_EXCHANGE = media_type("application/json"), ""


class Journal:
    """One reader.

    came: called with each record, in order, those that this reader writes included; never with a knock.
    lost: set when this reader is it no more.
    """

    def __init__(self, channel: Channel, queue: str, came: Callable[[Received], None]) -> None:
        self._channel, self._queue, self._came = channel, queue, came
        self._knock = str(uuid.uuid4())
        self._whole = asyncio.Event()
        self.lost = asyncio.Event()

    async def open(self, seconds: float) -> None:
        """Take one's place among the readers.  Raises TimeoutError, ConnectionLost, the client's errors."""
        await self._channel.consume(self._queue, prefetch=0, deliver=self._take, cancelled=self._end)
        text = header_table([(KNOCK, self._knock), ("reliamq-at", str(time.time()))])
        await self._write([(text, b"")], time.monotonic() + seconds)

    async def read_all(self) -> None:
        """Wait for one's turn and for all that was written before it.  Raises ConnectionLost."""
        ended = asyncio.ensure_future(self.lost.wait())
        whole = asyncio.ensure_future(self._whole.wait())
        try:
            await asyncio.wait({ended, whole}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            whole.cancel()
        if not self._whole.is_set():
            raise self._failure()

    async def write(self, records: Sequence[tuple[bytes, bytes]], *, deadline: float) -> Sequence[Fate]:
        """Write records: encoded headers and body each.  They come to this reader too, later."""
        return await self._channel.publish(
            [Outgoing(DEFAULT_EXCHANGE, self._queue, JSON, headers, body) for headers, body in records],
            deadline=deadline,
        )

    async def _write(self, records: Sequence[tuple[bytes, bytes]], deadline: float) -> None:
        for fate in await self.write(records, deadline=deadline):
            if fate is not Fate.CONFIRMED:
                raise self._failure() if self.lost.is_set() else TimeoutError(f"{self._queue}: {fate.value}")

    async def remove(self, tags: Sequence[int]) -> None:
        """Remove records by the tags that they came with."""
        await self._channel.ack(tags)

    async def flush(self) -> None:
        """Wait until the broker has heard of what was removed."""
        await self._channel.flush(0)

    def _take(self, received: Received) -> None:
        knock = received.headers.get(KNOCK)
        if knock is None:
            self._came(received)
        elif knock == self._knock:
            self._whole.set()
            self._drop(received.tag)
        elif time.time() - float(received.headers.get("reliamq-at", 0)) > STALE_SECONDS:
            self._drop(received.tag)  # of a reader that has gone; others still wait for theirs

    def _drop(self, tag: int) -> None:
        removing = asyncio.get_running_loop().create_task(self.remove([tag]))
        removing.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _end(self) -> None:
        self.lost.set()

    def _failure(self) -> ConnectionLost:
        return ConnectionLost(f"{self._queue}: {self._channel.lost or 'the queue is gone, or its leader'}")


@asynccontextmanager
async def open_journal(
    connection: Connection, settings: RabbitmqSettings, queue: str, came: Callable[[Received], None]
) -> AsyncIterator[Journal]:
    """Be among the readers; leaving lets the next one read.  Raises TimeoutError, the client's errors."""
    async with short_channel(connection, settings, confirms=True) as channel:
        journal = Journal(channel, queue, came)
        await journal.open(settings.request_timeout_seconds)
        yield journal
