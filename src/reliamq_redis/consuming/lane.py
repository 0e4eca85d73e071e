"""One lane while it is this member's: acquired for a while, renewed, and handed over with all that is known of it.

It promises that nothing is handed out before what the member before had is known, that what was settled is with the
server when :meth:`Lane.write` returns, and that whoever lost the lane changes nothing: each of its steps carries the
lane's token, which is another one by then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from reliamq.spi import BrokerUnavailable, Message
from reliamq_redis.catalog.names import LaneKeys
from reliamq_redis.consuming.window import Changes, Held, LaneWindow, order_of
from reliamq_redis.scripts import script
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.attempts import Attempts
from reliamq_redis.wire.errors import FAILURES, is_elsewhere, said
from reliamq_redis.wire.records import Fields, fingerprint, message_of, own_fields, readable
from reliamq_redis.wire.servers import Servers

__all__ = ["Lane", "LaneLost"]

logger = logging.getLogger("reliamq.redis")
ACQUIRE, FETCH, WRITE = script("acquire"), script("fetch"), script("write")
SETTLE_SECONDS = 2.0
"""How long a lane that is wanted elsewhere waits for what was handed out and has not started; the core gives that back
as soon as it comes to it.
"""
ASK_SECONDS = 0.1
"""How often it is asked for while another member has it."""
LOOK_SECONDS = 5.0
"""How often it is asked, at least, what comes back: sooner than anything does that has just gone away."""
FETCHED, PENDING = 250, 25
"""Entries that are taken at once: new ones, of whose size something is known; and those that somebody had before."""
NEW, FIRST = ">", "0-0"
MOST_FIELDS = 6_900
"""Of one that can be written again; Lua passes on 8,000 at once."""


class LaneLost(Exception):
    """Another member has the lane, or nobody knows who; this one changes nothing more in it."""


@dataclass(frozen=True, slots=True)
class _Grant:
    """died, suspect, attempts: as ``acquire.lua`` says.  ahead: seconds by which its clock is ahead of ours."""

    died: bool
    suspect: str
    attempts: dict[str, Attempts]
    ahead: float


class Lane:
    """One lane.

    retiring: it is wanted elsewhere; nothing more is handed out or started.
    stopping: nobody works on what is handed out.
    settled: set whenever a delivery has ended.
    reached: how far the group was seen to be, in the memory of whoever made this one.
    """

    def __init__(
        self,
        servers: Servers,
        settings: RedisSettings,
        topic: str,
        group: str,
        number: int,
        member: str,
        lease: float,
        changed: Callable[[], None],
        reached: str = FIRST,
    ) -> None:
        self.number, self.reached = number, reached
        self._servers, self._settings = servers, settings
        self._topic, self._group, self._member = topic, group, member
        self._keys, self._lease = LaneKeys(topic, number, group), lease
        self._changed = changed
        self._token, self._sure_until = 0, 0.0
        self._writing = asyncio.Lock()
        self._ended = asyncio.Event()
        self._window: LaneWindow | None = None
        self.retiring = self.stopping = False
        self.settled = asyncio.Event()
        self._label = f"lane {number} of group '{group}' on '{topic}'"

    # --- its life --------------------------------------------------------------------------------------------------

    async def hold(self) -> bool:
        """Take it, have it until it is retired, and hand it over; whether it was had.

        Raises LaneLost, BrokerUnavailable and the client's errors.  Cancelled: as when the process dies; whoever comes
        next suspects what it had.
        """
        grant = await self._acquire()
        if grant is None:
            return False
        window = LaneWindow(
            self._group,
            grant.attempts,
            died=grant.died,
            suspect=grant.suspect,
            wall_ahead=grant.ahead,
            prefetch=self._settings.prefetch,
        )
        try:
            await self._read_what_came_before(window)
            self._window = window  # from now on something may go out
            self._changed()
            await self._serve(window)
            await self._hand_over(window)
        finally:
            self._window = None
            self._changed()
        return True

    @property
    def window(self) -> LaneWindow | None:
        """What is here of it; None once somebody else may have it, and then for good: who was told so has dropped what
        it worked on, and an answer that comes late must not let it start what is behind that.
        """
        if self._token and time.monotonic() >= self._sure_until:
            self.lose()
        return self._window if self._token else None

    async def _acquire(self) -> _Grant | None:
        """Wait for it; None if it is no more wanted by then."""
        while not self.retiring:
            keys = [self._keys.stream, self._keys.state, self._keys.attempts]
            asked = time.monotonic()
            token, *rest = await self._servers.run(ACQUIRE, keys, [self._group, self._member, self._milliseconds])
            if token:
                anew, died, position, suspect, attempts, now = rest
                self._token, self._sure_until = token, asked + self._lease
                self._check_position(position.decode(), anew=bool(anew))
                return _Grant(bool(died), suspect.decode(), _attempts(attempts), now / 1000 - asked)
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_SECONDS):
                    await self._ended.wait()
        return None

    def _check_position(self, position: str, *, anew: bool) -> None:
        if anew:
            logger.error(
                "%s was gone (flushed, deleted, or lost in a failover) and is made anew from the beginning of what is "
                "there; what was confirmed before may be lost: replay the outbox (reliamq outbox replay --since)",
                self._label,
            )
        elif order_of(position) < order_of(self.reached):
            logger.error(
                "%s fell back from %s to %s (a failover to a replica that lacked it?); what was confirmed in between "
                "may be lost: replay the outbox (reliamq outbox replay --since)",
                *(self._label, self.reached, position),
            )
        self.reached = position

    async def _read_what_came_before(self, window: LaneWindow) -> None:
        """All that was fetched and is not finished."""
        for name, fields in await self._pending(FIRST):
            self._take_in(window, name.decode(), fields, came_back=True)
        window.all_came()

    async def _pending(self, start: str) -> Sequence[tuple[bytes, Fields]]:
        """What the group has behind that entry, and has not finished."""
        pending: list[tuple[bytes, Fields]] = []
        while True:
            _, entries, _ = await self._fetch(start, PENDING)
            pending += entries
            if len(entries) < PENDING:
                return pending
            start = entries[-1][0].decode()

    def retire(self) -> None:
        """It is wanted elsewhere, or nobody asks any more."""
        if not self.retiring:
            self.retiring = True
            self._ended.set()
            self.settled.set()

    def lose(self) -> None:
        """It is another member's, or may be: let it be taken anew."""
        self._token = 0
        self._ended.set()

    # --- while it is had -------------------------------------------------------------------------------------------

    async def _serve(self, window: LaneWindow) -> None:
        """Fetch what comes, for as long as there is room; and keep the lease.

        A server that is away is waited for, as long as nobody else can have the lane.
        Raises LaneLost, and the client's errors.
        """
        while not self._ended.is_set():
            try:
                await self._fetch_or_wait(window)
            except (*FAILURES, BrokerUnavailable) as error:
                away = isinstance(error, BrokerUnavailable) or is_elsewhere(error)
                if not away or time.monotonic() >= self._sure_until:
                    raise
                logger.warning("%s: the server is away, trying again: %s", self._label, said(error))
                await asyncio.sleep(ASK_SECONDS)
        if not self._token:
            raise LaneLost(f"{self._label} is another member's by now")

    async def _fetch_or_wait(self, window: LaneWindow) -> None:
        left = -1
        if room := min(window.room, FETCHED):
            position, entries, left = await self._fetch(NEW, room)
            if order_of(position) > order_of(self.reached):  # the answer before this one was lost on its way
                entries = await self._pending(self.reached)
            self._advance(position, entries)
            for name, fields in entries:
                self._take_in(window, name.decode(), fields, came_back=False)
            if entries:
                self._changed()
                return
        await self._write(renew=not room)
        await self._pause(window, left)

    def _advance(self, position: str, entries: Sequence[tuple[bytes, Fields]]) -> None:
        """The group is further now.  Raises LaneLost where it is not where this member left it."""
        if order_of(position) < order_of(self.reached):
            left = self.reached
            self._check_position(position, anew=False)
            raise LaneLost(f"{self._label} is at {position}, where this member did not leave it ({left})")
        if entries:
            self.reached = entries[-1][0].decode()

    async def _pause(self, window: LaneWindow, left: int) -> None:
        """Until there may be something to do: new entries, room, what comes back in so many milliseconds."""
        seconds = min(self._lease / 3, LOOK_SECONDS)
        if left >= 0:
            seconds = min(seconds, left / 1000)
        waits: list[Coroutine[Any, Any, object]] = [self._ended.wait()]
        if window.room:
            waits.append(self._hear_of_new(max(0.005, seconds)))
        else:
            self.settled.clear()
            waits.append(self.settled.wait())
        tasks = [asyncio.ensure_future(each) for each in waits]
        try:
            # Reading ends by itself; cut off it would cost its connection
            limit = None if window.room else seconds
            await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _hear_of_new(self, seconds: float) -> None:
        """Wait for an entry that the group has not had; it is not taken by this."""
        command = ("XREAD", "COUNT", 1, "BLOCK", int(seconds * 1000) + 1, "STREAMS", self._keys.stream, self.reached)
        await self._servers.call(self._keys.stream, *command, wait=seconds)

    async def _fetch(self, start: str, count: int) -> tuple[str, Sequence[tuple[bytes, Fields]], int]:
        keys = [self._keys.stream, self._keys.state, self._keys.delayed, self._keys.waiting]
        arguments = [self._group, self._token, self._milliseconds, start, count]
        # Cancelled, or the answer lost: what was taken is found again by whoever has the lane next
        asked = time.monotonic()
        answer = await self._servers.run(FETCH, keys, arguments)
        if answer is None:
            raise LaneLost(f"{self._label} is another member's by now")
        self._sure_until = asked + self._lease
        position, entries, left = answer
        return position.decode(), entries, int(left)

    @property
    def _milliseconds(self) -> int:
        return int(self._lease * 1000)

    def _take_in(self, window: LaneWindow, name: str, fields: Fields | None, *, came_back: bool) -> None:
        if fields is None:
            logger.error("%s: entry %s was removed (XDEL, XTRIM) before it was handled: it is lost", self._label, name)
            window.pass_over(name)
            return
        notes = own_fields(fields)
        message, ours = self._message(fields)
        if message.only_group not in (None, self._group) or notes.get("for", self._group) != self._group:
            window.pass_over(name)
            return
        held = Held(message, name, ours and len(fields) < MOST_FIELDS)
        window.take_in(held, Attempts.carried(notes), came_back=came_back, now=time.monotonic())

    def _message(self, fields: Fields) -> tuple[Message, bool]:
        """As a message, and whether it is one; what nobody of ours wrote is handed on as it is (C11)."""
        try:
            return message_of(self._topic, fields), True
        except (KeyError, ValueError):
            message = Message(
                topic=self._topic,
                body=dict(zip(fields[::2], fields[1::2], strict=False)).get(b"data", b""),
                id=f"{self._topic}/{self.number}/{fingerprint(fields)}",
                type="",
                source="redis",
                time=datetime.now(UTC),
                content_type="application/octet-stream",
                headers=readable(fields),
            )
            return message, False

    # --- what is written down --------------------------------------------------------------------------------------

    async def write(self) -> None:
        """Have the server know what the window says.

        Raises LaneLost when it is another member's, and the client's errors: then it is told again.  Cancelled: it may
        be written, and is written again with what comes next.
        """
        await self._write(renew=False)

    async def _write(self, *, renew: bool, last: bool = False) -> None:
        async with self._writing:
            window = self._window
            if window is None or not self._token:
                raise LaneLost(f"{self._label} is not this member's any more")
            changes = window.changes()
            if not changes and not renew and not last:
                return
            asked = time.monotonic()
            try:
                kept = await self._servers.run(WRITE, self._written_keys, self._arguments(changes, last=last))
            except BaseException:
                window.not_written(changes)
                raise
            if not kept:
                self.lose()
                raise LaneLost(f"{self._label} is another member's by now")
            self._sure_until = asked + self._lease

    @property
    def _written_keys(self) -> Sequence[str]:
        keys = self._keys
        return keys.stream, keys.state, keys.attempts, keys.delayed, keys.waiting

    def _arguments(self, changes: Changes, *, last: bool) -> Sequence[Any]:
        attempts = [part for name, one in changes.attempts.items() for part in (name, one.text())]
        away = [part for name, delay, fields in changes.away for part in (name, delay, len(fields), *fields)]
        return [
            self._group,
            self._token,
            0 if last else self._milliseconds,
            *(len(changes.finished), *changes.finished),
            *(len(changes.forgotten), *changes.forgotten),
            *(len(changes.attempts), *attempts),
            *away,
        ]

    # --- handing over ----------------------------------------------------------------------------------------------

    async def _hand_over(self, window: LaneWindow) -> None:
        """Let whoever comes next know all; one whose handlers go on suspects what they have."""
        await self._wait_for_handlers(window)
        if self.stopping:
            window.release_all()
        clean = not window.handed
        await self._write(renew=True, last=clean)
        if not clean:
            logger.warning("%s is handed over while %d handlers go on", self._label, window.handed)

    async def _wait_for_handlers(self, window: LaneWindow) -> None:
        """While others wait for it the lease is kept; as long as handlers work whose own leases are renewed."""
        began = time.monotonic()
        while window.handed and not self.stopping:
            left = began + SETTLE_SECONDS - time.monotonic()
            if left <= 0 and not window.started:
                return
            self.settled.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(left, 0.1), self._lease / 3)):
                    await self.settled.wait()
            with suppress(*FAILURES, BrokerUnavailable):  # its end is told by the last write
                await self._write(renew=True)


def _attempts(answer: Sequence[bytes]) -> dict[str, Attempts]:
    known: dict[str, Attempts] = {}
    for name, text in zip(answer[::2], answer[1::2], strict=True):
        try:
            known[name.decode()] = Attempts.read(text.decode())
        except ValueError as error:
            logger.error("entry %s: what is written of its attempts cannot be read: %s", name, error)
    return known
