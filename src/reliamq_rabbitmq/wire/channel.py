"""A channel that publishes many messages at once and hands on deliveries without a task for each.

It is the client's channel with three things done otherwise.  A batch is written in one piece and has one future, and
confirms are counted against it.  A returned message is known by the number of its attempt, because two attempts may
carry the same message (the client tells them apart by message id, and reports the wrong one).  And a delivery is handed
to a plain function, so that closing the channel cancels nothing of ours.

It promises an outcome for each message by the deadline: confirmed, returned, refused, unsent, or unknown.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Any

from aiormq.abc import ChannelFrame
from aiormq.channel import Channel as ClientChannel
from aiormq.connection import Connection
from aiormq.exceptions import AMQPError
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from reliamq_rabbitmq.wire.frames import publishing

__all__ = [
    "SILENT_SECONDS",
    "Channel",
    "ConnectionLost",
    "Fate",
    "Outgoing",
    "Received",
    "is_blocked",
    "open_channel",
]

PIECE_BYTES = 256 * 1024
"""Of a batch, how much is handed to the connection at once."""
MOST_UNCONFIRMED = 20_000
"""Messages whose confirms are outstanding; above it, and above as many bytes, nothing is sent, so that memory is
bounded while a queue has no majority or the broker takes nothing (P6).
"""
MOST_UNCONFIRMED_BYTES = 64 * 1024 * 1024
LOOK_SECONDS = 1.0
SILENT_SECONDS = 20.0
"""What waits for a confirm gives up when none at all came for so long: a node that froze may never give it."""
FRAME_MAX = 131_072
"""Where a broker sets no limit: its default."""
HEADER_OVERHEAD = 600
"""Of a frame with headers: its head and end, class, flags, media type, message id."""
ACK, NACK = 80, 120
MULTIPLE, REQUEUE = 1, 2
_settling = struct.Struct(">BHIHHQBB")


class ConnectionLost(AMQPError):
    """The connection or the channel ended while an answer was awaited."""


class Fate(Enum):
    """What became of one message."""

    CONFIRMED = "confirmed"
    RETURNED = "returned"
    """No queue received it; certainly not stored."""
    REFUSED = "refused"
    """The broker says that it could not store it in every queue; it may be in some."""
    UNSENT = "unsent"
    UNKNOWN = "unknown"
    """Written, and no answer: the deadline passed, or the connection ended."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish.  media_type, headers: encoded."""

    exchange: str
    routing_key: str
    media_type: bytes
    headers: bytes
    body: bytes


class Received:
    """One delivery.

    tag: its number on the channel.  name: its AMQP message id.  redelivered: the broker had given it to somebody
    before.
    """

    __slots__ = ("body", "content_type", "headers", "name", "redelivered", "tag")

    def __init__(
        self,
        tag: int,
        redelivered: bool,
        content_type: str | None,
        headers: Mapping[str, Any],
        body: bytes,
        name: str | None = None,
    ) -> None:
        self.tag, self.redelivered, self.content_type = tag, redelivered, content_type
        self.headers, self.body, self.name = headers, body, name

    def fingerprint(self) -> str:
        """A name for one that reliamq did not write: its own, or the same for the same bytes."""
        return self.name or blake2b(self.body, digest_size=16).hexdigest()


class _Batch:
    """Messages that are confirmed together.  left: how many are still to be."""

    __slots__ = ("done", "fates", "left")

    def __init__(self, count: int) -> None:
        self.fates, self.left = [Fate.UNSENT] * count, count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def conclude(self, index: int, fate: Fate) -> None:
        self.fates[index] = fate
        self.leave_out(1)

    def leave_out(self, count: int) -> bool:
        """So many fewer are to be confirmed; whether any is left."""
        self.left -= count
        if self.left <= 0 and not self.done.done():
            self.done.set_result(None)
        return self.left > 0


class Channel(ClientChannel):
    """See the module.  Used by one task at a time for publishing, and by one consumer.

    lost: why it ended; None while it is open.  closed_for: the broker's reply code, if it closed it.
    """

    def __init__(self, connection: Connection, number: int, *, confirms: bool) -> None:
        super().__init__(connection, number, publisher_confirms=confirms)
        self._connection, self._published = connection, 0
        self._unconfirmed: dict[int, tuple[_Batch, int, int]] = {}  # by number: whose, which of it, its bytes
        self._unconfirmed_bytes = 0
        self._heard_at = 0.0
        self._returned: set[int] = set()
        self._writing = asyncio.Lock()
        self._deliver: Callable[[Received], None] | None = None
        self._cancelled: Callable[[], None] | None = None
        self._frame_max = connection.connection_tune.frame_max or FRAME_MAX
        self.lost: str | None = None
        self.closed_for: int | None = None
        self._end: asyncio.Future[Any] = self.closing
        self._end.add_done_callback(self._ended)

    # --- publishing ------------------------------------------------------------------------------------------------

    async def publish(self, batch: Sequence[Outgoing], *, deadline: float) -> Sequence[Fate]:
        """Publish and wait for the confirms; each message's fate.

        deadline: monotonic seconds.  Cancelled: what was written may be stored.
        """
        waiting = _Batch(len(batch))
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                async with self._writing:
                    written = await self._write(batch, waiting)
                if waiting.leave_out(len(batch) - written):
                    await self._hear_of(waiting)
        except TimeoutError:
            pass
        return waiting.fates

    async def _hear_of(self, waiting: _Batch) -> None:
        """Wait for the confirms, unless the channel is silent for too long, and not because of an alarm; or one was
        refused a while ago: then the node has no way to the queue, and refuses one after the other, each when it has
        tried.
        """
        while not (await asyncio.wait({waiting.done}, timeout=LOOK_SECONDS))[0]:
            if Fate.REFUSED in waiting.fates:
                await asyncio.wait({waiting.done}, timeout=LOOK_SECONDS)
                return
            if self.silent_seconds >= SILENT_SECONDS and not await is_blocked(self._connection):
                return

    async def _write(self, batch: Sequence[Outgoing], waiting: _Batch) -> int:
        """Write what may be written, piece by piece, each when the one before has gone out; how many messages."""
        start = 0
        while start < len(batch) and self.lost is None and self._has_room():
            payload, end = self._piece(batch, start)
            gone = asyncio.get_running_loop().create_future()
            # Cancelled here: the piece is not written, and its numbers are given to the next
            if not await self._queued(ChannelFrame(payload=payload, should_close=False, drain_future=gone)):
                break
            if not self._unconfirmed:
                self._heard_at = time.monotonic()
            for place in range(start, end):
                self._published += 1
                self._unconfirmed[self._published] = waiting, place, len(batch[place].body)
                self._unconfirmed_bytes += len(batch[place].body)
                waiting.fates[place] = Fate.UNKNOWN
            start = end
            if start < len(batch):
                await asyncio.wait({gone, self._end}, return_when=asyncio.FIRST_COMPLETED)
        return start

    def _has_room(self) -> bool:
        return len(self._unconfirmed) < MOST_UNCONFIRMED and self._unconfirmed_bytes < MOST_UNCONFIRMED_BYTES

    def _piece(self, batch: Sequence[Outgoing], start: int) -> tuple[bytes, int]:
        """The frames of as many messages as are written at once, and the index of the next."""
        frames, size, index = list[bytes](), 0, start
        while index < len(batch) and size < PIECE_BYTES:
            one = batch[index]
            number = self._published + 1 + index - start
            frames += publishing(
                self.number,
                b"%d" % number,
                exchange=one.exchange,
                routing_key=one.routing_key,
                media_type=one.media_type,
                headers=one.headers,
                body=one.body,
                frame_max=self._frame_max,
            )
            size += len(one.body) + len(one.headers)
            index += 1
        return b"".join(frames), index

    async def _put(self, payload: bytes) -> None:
        if not await self._queued(ChannelFrame(payload=payload, should_close=False)):
            raise ConnectionLost(str(self.lost))

    async def _queued(self, frame: ChannelFrame) -> bool:
        """Whether it was given to the connection's writer; False when the channel ended before there was room.

        A frame on a channel that has ended may be another channel's by its number, and end the connection.
        """
        queue = self.write_queue
        while self.lost is None:
            if not queue.full():
                queue.put_nowait(frame)
                return True
            nothing = ChannelFrame(payload=b"", should_close=False)  # waits for room, and takes none for long
            room = asyncio.ensure_future(queue.put(nothing))
            try:
                await asyncio.wait({room, self._end}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                room.cancel()
        return False

    async def _on_return_frame(self, frame: commands.Basic.Return) -> None:
        received = await self._content(0, False)
        if received.name is not None and received.name.isdecimal():
            self._returned.add(int(received.name))

    async def _on_confirm_frame(self, frame: Any) -> None:
        tag, fate = frame.delivery_tag, Fate.CONFIRMED if isinstance(frame, commands.Basic.Ack) else Fate.REFUSED
        self._heard_at = time.monotonic()
        if not frame.multiple:
            self._conclude(tag, fate)
            return
        for number in list(self._unconfirmed):  # they are in order
            if number > tag:
                break
            self._conclude(number, fate)

    def _conclude(self, number: int, fate: Fate) -> None:
        known = self._unconfirmed.pop(number, None)
        if known is None:
            return
        if self._returned and number in self._returned:
            self._returned.discard(number)
            fate = Fate.RETURNED
        waiting, place, size = known
        self._unconfirmed_bytes -= size
        waiting.conclude(place, fate)

    async def idle(self, seconds: float) -> None:
        """Until nothing is unconfirmed, or the channel ended; at most for so long."""
        if outstanding := {batch.done for batch, _, _ in self._unconfirmed.values()}:
            await asyncio.wait(outstanding, timeout=seconds)

    @property
    def header_room(self) -> int:
        """Bytes of headers that one message can have: AMQP has them in one frame."""
        return self._frame_max - HEADER_OVERHEAD

    @property
    def silent_seconds(self) -> float:
        """For how long something is unconfirmed, and nothing was confirmed."""
        return time.monotonic() - self._heard_at if self._unconfirmed else 0.0

    # --- consuming -------------------------------------------------------------------------------------------------

    async def listen(self, queue: str, *, deliver: Callable[[Received], None], cancelled: Callable[[], None]) -> None:
        """Have ``deliver`` called with each delivery, acknowledged as it comes: for what nobody misses."""
        self._deliver, self._cancelled = deliver, cancelled
        await self.rpc(commands.Basic.Consume(queue=queue, no_ack=True, consumer_tag=f"reliamq-{self.number}"))

    async def consume(
        self, queue: str, *, prefetch: int, deliver: Callable[[Received], None], cancelled: Callable[[], None]
    ) -> None:
        """Have ``deliver`` called with each delivery, in order; ``cancelled`` when the broker ends that by itself.

        prefetch: most that is unacknowledged at once.  (Of 0 a quorum queue makes 2,000.)
        """
        self._deliver, self._cancelled = deliver, cancelled
        await self.basic_qos(prefetch_count=prefetch)
        await self.rpc(commands.Basic.Consume(queue=queue, consumer_tag=f"reliamq-{self.number}"))

    async def _on_deliver_frame(self, frame: commands.Basic.Deliver) -> None:
        received = await self._content(frame.delivery_tag or 0, bool(frame.redelivered))
        if self._deliver is not None:
            self._deliver(received)

    async def _on_cancel_frame(self, frame: commands.Basic.Cancel | commands.Basic.CancelOk) -> None:
        if isinstance(frame, commands.Basic.Cancel) and self._cancelled is not None:
            self._cancelled()

    async def _content(self, tag: int, redelivered: bool) -> Received:
        header = await self._get_frame()
        if not isinstance(header, ContentHeader):
            raise ConnectionLost(f"a content header was expected, not {header!r}")
        parts, left = list[bytes](), header.body_size
        while left > 0:
            part = await self._get_frame()
            if not isinstance(part, ContentBody):
                raise ConnectionLost(f"a body was expected, not {part!r}")
            parts.append(part.value)
            left -= len(part.value)
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        properties = header.properties
        headers = properties.headers or {}
        return Received(tag, redelivered, properties.content_type, headers, body, properties.message_id)

    async def ack(self, tags: Sequence[int], *, up_to: int | None = None) -> None:
        """Acknowledge these, and all up to a tag.  Written, not answered: see :meth:`flush`."""
        frames = [_settle(self.number, ACK, up_to, MULTIPLE)] if up_to is not None else []
        frames += [_settle(self.number, ACK, tag, 0) for tag in tags]
        await self._put(b"".join(frames))

    async def requeue(self, tag: int) -> None:
        """Have one come again at once."""
        await self._put(_settle(self.number, NACK, tag, REQUEUE))

    async def flush(self, prefetch: int) -> None:
        """Wait until the broker has what was written before: it answers in order.  prefetch: as it is set."""
        await self.basic_qos(prefetch_count=prefetch)

    # --- its end ---------------------------------------------------------------------------------------------------

    async def finish(self) -> None:
        """Close it; nothing is written to it any more, and nobody hears of its end."""
        self.lost, self._deliver, self._cancelled = self.lost or "closed", None, None
        await self.close(ConnectionLost("closed"))

    async def _on_close_frame(self, frame: commands.Channel.Close) -> None:
        self.closed_for = frame.reply_code
        self.lost = f"the broker closed the channel: {frame.reply_code} {frame.reply_text}"
        await super()._on_close_frame(frame)

    def _ended(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        self.lost = self.lost or (repr(error) if error is not None else "closed")
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for batch, index, _ in unconfirmed.values():
            batch.conclude(index, Fate.UNKNOWN)
        if self._cancelled is not None:
            self._cancelled()


def _settle(channel: int, method: int, tag: int, bits: int) -> bytes:
    return _settling.pack(1, channel, 13, 60, method, tag, bits, 0xCE)


async def open_channel(connection: Connection, *, confirms: bool = False) -> Channel:
    """Open a channel on the connection, closed when the connection closes."""
    number = next(each for each in range(1, 65536) if each not in connection.channels)
    channel = Channel(connection, number, confirms=confirms)
    connection.channels[number] = channel
    await channel.open()
    return channel


async def is_blocked(connection: Connection) -> bool:
    """Whether the broker reads nothing from it, because memory or disk run short."""
    try:
        async with asyncio.timeout(0.01):
            await connection.ready()
    except TimeoutError:
        return True
    return False
