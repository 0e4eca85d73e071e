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
from reliamq_rabbitmq.consuming.window import Held, LaneWindow
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.channel import Channel, ConnectionLost, Received
from reliamq_rabbitmq.wire.connection import answered, short_channel
from reliamq_rabbitmq.wire.journal import Journal, open_journal
from reliamq_rabbitmq.wire.link import Linked, is_blocked
from reliamq_rabbitmq.wire.records import message_of, readable

__all__ = ["Held", "Lane"]

logger = logging.getLogger("reliamq.rabbitmq")
HANDOVER_SECONDS = 30.0
"""How long a lane that is wanted elsewhere waits for the handlers that have started."""
BLOCKED_SECONDS = 2.0
SETTLE_SECONDS = 2.0
"""And for what was handed out and has not started; the core gives that back as soon as it comes to it."""


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
        self._ended, self._woken = asyncio.Event(), asyncio.Event()
        self.window: LaneWindow | None = None
        self.retiring = self.stopping = False
        self.settled = asyncio.Event()

    # --- its life --------------------------------------------------------------------------------------------------

    async def hold(self) -> None:
        """Take it, have it until it is retired, and hand it over.

        Raises ConnectionLost, TimeoutError and the client's errors when it is lost.  Cancelled: as when the process
        dies; whoever comes next suspects what it had.
        """
        queue, writer = ledger_queue(self._topic, self._group, self.number), self._writer.channel
        try:
            async with open_journal(self._connection, self._settings, queue, self._ledger.came, writer) as journal:
                if not await self._has_turn(journal):
                    return
                suspicious = self._ledger.crashed
                await self._ledger.open(journal, writable=not await is_blocked(self._writer.connection))
                ahead = time.time() - time.monotonic()
                window = LaneWindow(self._ledger.restored, suspicious=suspicious, wall_ahead=ahead)
                async with short_channel(self._connection, self._settings) as channel:
                    await self._serve(channel, journal, window)
        finally:
            self.window = self._channel = None
            self._changed()

    async def _has_turn(self, journal: Journal) -> bool:
        """Wait for one's turn; False if it is no more wanted by then."""
        while not self.retiring:
            reading, ended = asyncio.ensure_future(self._read(journal)), asyncio.ensure_future(self._ended.wait())
            try:
                await asyncio.wait({reading, ended}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    reading.result()
                    return not self.retiring
            finally:
                reading.cancel()
                ended.cancel()
        return False

    async def _read(self, journal: Journal) -> None:
        """The ledger, whole.

        While an alarm keeps what publishes from being read, no knock comes back; but whoever works off what is there
        helps to end the alarm.  Then the lane's own single active consumer alone keeps two members apart.
        """
        reading = asyncio.ensure_future(journal.read_all())
        try:
            while not (await asyncio.wait({reading}, timeout=BLOCKED_SECONDS))[0]:
                if await is_blocked(self._writer.connection):
                    await journal.read_until_quiet(BLOCKED_SECONDS)
                    return
            reading.result()
        finally:
            reading.cancel()

    async def _serve(self, channel: Channel, journal: Journal, window: LaneWindow) -> None:
        self._channel, self.window = channel, window
        queue = lane_queue(self._topic, self._group, self.number)
        lost = asyncio.ensure_future(journal.lost.wait())
        lost.add_done_callback(lambda _: self._end())
        try:
            await answered(
                channel.consume(queue, prefetch=self._settings.prefetch, deliver=self._take_in, cancelled=self._end),
                self._settings.request_timeout_seconds,
            )
            await self._renew_until_ended()
            if not self.retiring or channel.lost is not None or journal.lost.is_set():
                raise ConnectionLost(f"{queue}: {channel.lost or 'the broker ended its consumer'}")
            await self._hand_over(window)
        finally:
            lost.cancel()

    async def _renew_until_ended(self) -> None:
        """What is not acknowledged for long, the broker takes back; so it is given back and taken again."""
        share = self._settings.ack_timeout_seconds / 4
        while not self._ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(share):
                    await self._woken.wait()
            self._woken.clear()
            async with self._writing:
                with suppress(NotWritten):  # later, then
                    await self._renew(time.monotonic() - 2 * share)

    async def _renew(self, before: float) -> None:
        window, channel = self.window, self._channel
        if window is None or channel is None or self._ended.is_set():
            return
        for tag in (*window.to_renew(before), *window.behind_renewed()):
            await channel.requeue(tag)
        await self._ledger.renew(before)

    def _end(self) -> None:
        self._ended.set()
        self._woken.set()

    def retire(self) -> None:
        """It is wanted elsewhere, or nobody asks any more."""
        if not self.retiring:
            self.retiring = True
            self._end()
            self.settled.set()

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
        """Bring to the broker what the window says.

        Acknowledgements first, because they get through when nothing can be written.  Raises ConnectionLost,
        TimeoutError: the lane is lost then; NotWritten: the ledger does not have all yet.  Cancelled: some is there.
        """
        async with self._writing:
            window, channel = self.window, self._channel
            if window is None or channel is None:
                raise ConnectionLost("the lane is not this member's any more")
            up_to, tags = window.acks()
            if up_to is not None or tags:
                await channel.ack(tags, up_to=up_to)
                await answered(channel.flush(self._settings.prefetch), self._settings.request_timeout_seconds)
            changed, ended = window.changes()
            try:
                await self._ledger.write(changed, ended)
            except BaseException:
                window.not_written(changed, ended)
                raise

    def lose(self) -> None:
        """What it is in is unknown: let it be taken anew."""
        self._end()
