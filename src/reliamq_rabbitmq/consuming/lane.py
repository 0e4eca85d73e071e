"""One lane while it is this member's: taken when the one before has let go, and handed over with all that is known of
it.

It promises that nothing is handed out before the lane's ledger was read, that what was settled is with the broker when
:meth:`Lane.write` returns, and that nothing of it is handed out once it is wanted elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from aiormq.connection import Connection

from reliamq.spi import Message
from reliamq_rabbitmq.catalog.names import lane_queue, ledger_queue
from reliamq_rabbitmq.consuming.ledger import Ledger, NotWritten
from reliamq_rabbitmq.consuming.window import LaneWindow
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.channel import Channel, ConnectionLost, Received, is_blocked, open_channel
from reliamq_rabbitmq.wire.connection import answered, close_channel
from reliamq_rabbitmq.wire.journal import Journal, open_journal
from reliamq_rabbitmq.wire.link import Linked
from reliamq_rabbitmq.wire.records import message_of, readable

__all__ = ["Lane"]

logger = logging.getLogger("reliamq.rabbitmq")
HANDOVER_SECONDS = 30.0
"""How long a lane that is wanted elsewhere waits for the handlers that have started."""
SETTLE_SECONDS = 2.0
"""And for what was handed out and has not started; the core gives that back as soon as it comes to it."""
BLOCKED_SECONDS = 2.0
"""How long a knock may take before an alarm is thought of; and how often its end is looked for."""
RENEWED_SECONDS = 30.0
"""How long what is renewed may take to come again."""


class Lane:
    """window: what is here of it; None while it is somebody else's.

    connection: that consumes.  writer: that publishes.
    retiring: it is wanted elsewhere; nothing more is handed out or started.
    stopping: nobody works on what is handed out.
    settled: set whenever a delivery has ended.
    """

    def __init__(
        self,
        connection: Connection,
        writer: Linked,
        settings: RabbitmqSettings,
        topic: str,
        group: str,
        number: int,
        changed: Callable[[], None],
    ) -> None:
        self.number = number
        self._connection, self._writer, self._settings = connection, writer, settings
        self._topic, self._group = topic, group
        self._changed = changed
        self._ledger = Ledger(settings.request_timeout_seconds)
        self._channel: Channel | None = None
        self._writing = asyncio.Lock()
        self._writes = set[asyncio.Task[None]]()
        self._ended, self._woken = asyncio.Event(), asyncio.Event()
        self.window: LaneWindow | None = None
        self.retiring = self.stopping = False
        self.settled = asyncio.Event()

    # --- its life --------------------------------------------------------------------------------------------------

    async def hold(self) -> None:
        """Take it, have it until it is retired, and hand it over.

        Raises ConnectionLost, TimeoutError, NotWritten and the client's errors when it is lost.  Cancelled: as when the
        process dies; whoever comes next suspects what it had.
        """
        queue, writer = ledger_queue(self._topic, self._group, self.number), self._writer.channel
        async with open_journal(self._connection, self._settings, queue, self._ledger.came, writer) as journal:
            if not await self._has_turn(journal):
                return
            lost = asyncio.ensure_future(journal.lost.wait())
            lost.add_done_callback(lambda _: self._end())
            try:
                await self._serve(journal)
            finally:
                lost.cancel()

    async def _has_turn(self, journal: Journal) -> bool:
        """Wait for one's turn and read the ledger; False if the lane is no more wanted by then."""
        reading, ended = asyncio.ensure_future(self._read(journal)), asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            return reading.done() and not self.retiring
        finally:
            reading.cancel()
            ended.cancel()

    async def _read(self, journal: Journal) -> None:
        """The ledger, whole, unless an alarm is on.

        Then no knock comes back, because the broker reads nothing from who publishes; but whoever works off what is
        there helps to end it.  The lane's own single active consumer alone keeps two members apart then, what comes of
        the ledger is known and not removed, and it is read whole when the alarm is over.
        """
        reading = asyncio.ensure_future(journal.read_all())
        try:
            while not (await asyncio.wait({reading}, timeout=BLOCKED_SECONDS))[0]:
                if await is_blocked(self._writer.connection):
                    await journal.read_until_quiet(BLOCKED_SECONDS)
                    return
            reading.result()
            await self._ledger.open(journal)
        finally:
            reading.cancel()

    async def _serve(self, journal: Journal) -> None:
        ahead = time.time() - time.monotonic()
        window = LaneWindow(self._ledger.restored, suspicious=self._ledger.crashed, wall_ahead=ahead)
        try:
            self.window = window  # from now on something may come
            await self._consume()
            await self._tend(journal, window)
            if not self.retiring or self._lost is not None or journal.lost.is_set():
                raise ConnectionLost(f"lane {self.number}: {self._lost or 'the broker ended its consumer'}")
            await self._hand_over(window)
        finally:
            self.window = None
            self._changed()
            if self._channel is not None:
                await close_channel(self._channel)

    @property
    def _lost(self) -> str | None:
        return self._channel.lost if self._channel is not None else "closed"

    async def _consume(self) -> None:
        seconds = self._settings.request_timeout_seconds
        self._channel = channel = await answered(open_channel(self._connection), seconds)
        queue, prefetch = lane_queue(self._topic, self._group, self.number), self._settings.prefetch
        consuming = channel.consume(queue, prefetch=prefetch, deliver=self._take_in, cancelled=self._end)
        await answered(consuming, seconds)

    def _end(self) -> None:
        self._ended.set()
        self._woken.set()

    def retire(self) -> None:
        """It is wanted elsewhere, or nobody asks any more."""
        if not self.retiring:
            self.retiring = True
            self._end()
            self.settled.set()

    def lose(self) -> None:
        """What it is in is unknown: let it be taken anew."""
        self._end()

    # --- while it is had -------------------------------------------------------------------------------------------

    async def _tend(self, journal: Journal, window: LaneWindow) -> None:
        """Until it ends: finish what an alarm put off, and renew what is old.

        What is not acknowledged for long, the broker takes back; so it is given back before that, and taken again.
        """
        share = self._settings.ack_timeout_seconds / 4
        while not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(share if self._is_written(window) else BLOCKED_SECONDS):
                    await self._woken.wait()
            self._woken.clear()
            if self._ended.is_set():
                return
            with suppress(NotWritten):  # later, then
                await self._catch_up(journal, window)
                await self._renew(window, time.monotonic() - 2 * share)

    def _is_written(self, window: LaneWindow) -> bool:
        return self._ledger.is_open and not window.owes_ledger

    async def _catch_up(self, journal: Journal, window: LaneWindow) -> None:
        if not self._ledger.is_open and not await is_blocked(self._writer.connection):
            await answered(journal.read_all(), self._settings.request_timeout_seconds)
            await self._ledger.open(journal)
            window.suspicious = window.suspicious or self._ledger.crashed
        await self.write()

    async def _renew(self, window: LaneWindow, before: float) -> None:
        await self._ledger.renew(before)
        if not window.is_old(before):
            return
        async with self._writing:
            await self._acknowledge(window)
            window.renew()
            if self._channel is not None:
                await close_channel(self._channel)
            # Nobody else consumes the lane: the broker gives back all of it, in order, and to this member
            await self._consume()
        asyncio.get_running_loop().call_later(RENEWED_SECONDS, self._check_renewed, window)

    def _check_renewed(self, window: LaneWindow) -> None:
        """Somebody else has got it, if something did not come again."""
        if window is self.window and window.is_renewing(time.monotonic() - RENEWED_SECONDS / 2):
            logger.error("lane %d of group '%s': what was renewed does not come again", self.number, self._group)
            self.lose()

    async def _hand_over(self, window: LaneWindow) -> None:
        await self._wait_for_handlers(window)
        clean = self.stopping or not window.handed
        if self.stopping:
            window.release_all()
        with suppress(NotWritten):  # then whoever comes next suspects more than it need
            await self.write()
            await self._ledger.close(window.suspects(), clean=clean and not window.owes)

    async def _wait_for_handlers(self, window: LaneWindow) -> None:
        began = time.monotonic()
        while window.handed and not self.stopping:
            patience = HANDOVER_SECONDS if window.started else SETTLE_SECONDS
            left = began + patience - time.monotonic()
            if left <= 0:
                return
            self.settled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, SETTLE_SECONDS)):
                    await self.settled.wait()

    # --- what comes ------------------------------------------------------------------------------------------------

    def _take_in(self, received: Received) -> None:
        if self.window is None:
            return
        carried = Attempts.carried(received.headers)
        if self.window.take_in(received, self._message(received), carried, now=time.monotonic()):
            self._woken.set()
        self._changed()

    def _message(self, received: Received) -> Message:
        """As a message; one that nobody of ours wrote is handed on as it is (C11)."""
        try:
            return message_of(self._topic, received.content_type, received.body, received.headers)
        except (KeyError, ValueError, TypeError):
            return Message(
                topic=self._topic,
                body=received.body,
                id=f"{self._topic}/{self.number}/{received.fingerprint()}",
                type="",
                source="rabbitmq",
                time=datetime.now(UTC),
                content_type="application/octet-stream",
                headers=readable(received.headers),
            )

    # --- what goes to the broker -----------------------------------------------------------------------------------

    async def write(self) -> None:
        """Bring to the broker what the window says: acknowledgements, and attempts into the ledger.

        During an alarm nothing can be written: attempts are kept here until it is over, and a crash forgets them.
        Raises ConnectionLost, TimeoutError: the lane is lost then; NotWritten: the ledger does not have all yet.
        Cancelled: it is written all the same.
        """
        writing = asyncio.ensure_future(self._write())
        self._writes.add(writing)  # the event loop itself would forget it
        writing.add_done_callback(self._written)
        await asyncio.shield(writing)

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writes.discard(writing)
        if not writing.cancelled():
            writing.exception()  # who waits hears of it; where nobody does any more, the lane's end is known otherwise

    async def _write(self) -> None:
        async with self._writing:
            window = self.window
            if window is None:
                raise ConnectionLost("the lane is not this member's any more")
            await self._acknowledge(window)
            changed, ended = window.changes()
            if not changed and not ended:
                return
            written = False
            try:
                if self._ledger.is_open and not (changed and await is_blocked(self._writer.connection)):
                    await self._ledger.write(changed, ended)
                    written = True
            finally:
                if not written:
                    window.not_written(changed, ended)

    async def _acknowledge(self, window: LaneWindow) -> None:
        """When it returns, the broker's channel has them; whether the queue's members do, AMQP does not tell."""
        channel = self._channel
        if channel is None:
            raise ConnectionLost("the lane is not this member's any more")
        up_to, tags = window.acks()
        if up_to is not None or tags:
            await channel.ack(tags, up_to=up_to)
            await answered(channel.flush(self._settings.prefetch), self._settings.request_timeout_seconds)
