"""A lane's ledger: the attempts at its messages, and whether somebody had it and did not say farewell.

It promises that what was written and confirmed is known to whoever has the lane next.  There is one record for each
message that has attempts, replaced by writing the next one and then removing it; and one *open* record while a member
hands messages out, whose being there says that this member died.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence

from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.channel import Fate, Received
from reliamq_rabbitmq.wire.connection import answered
from reliamq_rabbitmq.wire.frames import header_table
from reliamq_rabbitmq.wire.journal import Journal
from reliamq_rabbitmq.wire.records import OURS

__all__ = ["Ledger", "NotWritten"]

logger = logging.getLogger("reliamq.rabbitmq")
OPEN = OURS + "open"
NO_HEADERS = header_table(())


class NotWritten(Exception):
    """The broker has not confirmed a record; the lane is this member's all the same."""


class Ledger:
    """restored: attempts by message, as they were found.  crashed: a member that had the lane has died."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._journal: Journal | None = None
        self._session = str(uuid.uuid4())
        self._reading = True
        self._tags: dict[str, tuple[int, float]] = {}  # of the newest record of each message, and since when
        self._latest: dict[str, Attempts] = {}  # what was written last, of those that stay
        self._old: list[int] = []  # records to remove
        self._opened: list[int] = []  # open records of members that died
        self._own: tuple[int, float] | None = None
        self.restored: dict[str, Attempts] = {}
        self.crashed = False

    # --- what comes ------------------------------------------------------------------------------------------------

    def came(self, received: Received) -> None:
        """A record, found or own."""
        session = received.headers.get(OPEN)
        if session is not None:
            self._came_open(session, received.tag)
            return
        try:
            name, attempts = Attempts.read(received.body)
        except ValueError as error:
            logger.error("a ledger holds a record that reliamq did not write; it is removed: %r", error)
            self._old.append(received.tag)
            return
        if self._reading:
            self.restored[name] = self._latest[name] = attempts
        elif name not in self._latest:  # struck out before it came back
            self._old.append(received.tag)
            return
        self._replace(name, received.tag)

    def _came_open(self, session: object, tag: int) -> None:
        if session != self._session:
            self._opened.append(tag)
            self.crashed = True
            return
        if self._own is not None:
            self._old.append(self._own[0])
        self._own = tag, time.monotonic()

    def _replace(self, name: str, tag: int) -> None:
        known = self._tags.get(name)
        if known is not None:
            self._old.append(known[0])
        self._tags[name] = tag, time.monotonic()

    # --- what is written -------------------------------------------------------------------------------------------

    async def open(self, journal: Journal) -> None:
        """All was read: from here on messages may be handed out.  Raises NotWritten."""
        await self._write_open(journal)
        self._journal, self._reading = journal, False

    @property
    def is_open(self) -> bool:
        """Whether all was read, and something can be written."""
        return self._journal is not None

    async def _write_open(self, journal: Journal) -> None:
        await self._confirmed(journal, [(header_table([(OPEN, self._session)]), b"")])
        # Those that died stay suspected by the records of this member, which are there now
        self._old += self._opened
        self._opened.clear()

    async def write(self, changed: Mapping[str, Attempts], ended: Sequence[str]) -> None:
        """Write what has changed, then remove what is replaced or over.  Raises ConnectionLost, NotWritten."""
        journal = self._journal
        if journal is None:
            raise NotWritten("the lane's ledger was not read yet")
        if changed:
            self._latest.update(changed)
            await self._confirmed(journal, [(NO_HEADERS, one.record(name)) for name, one in changed.items()])
        for name in ended:
            self._latest.pop(name, None)
            known = self._tags.pop(name, None)
            if known is not None:
                self._old.append(known[0])
        if self._old:
            old, self._old = self._old, []
            await journal.remove(old)

    async def _confirmed(self, journal: Journal, records: Sequence[tuple[bytes, bytes]]) -> None:
        fates = await journal.write(records, deadline=time.monotonic() + self._seconds)
        for fate in fates:
            if fate is not Fate.CONFIRMED:
                raise NotWritten(f"a record of the lane's ledger was not confirmed: {fate.value}")

    async def renew(self, before: float) -> None:
        """Have records that came before that come again: the broker takes back what is not acknowledged for long.

        Nothing is written, so that it works in an alarm too.
        """
        if self._journal is None:
            return
        await self._journal.tidy()
        old = [tag for tag, since in self._tags.values() if since < before]
        self._tags = {name: one for name, one in self._tags.items() if one[1] >= before}
        if self._own is not None and self._own[1] < before:
            old.append(self._own[0])
            self._own = None
        await self._journal.renew(old)

    async def close(self, suspects: Mapping[str, Attempts], *, clean: bool) -> None:
        """Say farewell.  suspects: what may still have been in a process that died.

        clean: no handler runs, and all that came back has come; else whoever comes next suspects all that it gets.
        """
        journal = self._journal
        if journal is None:
            return
        await self.write(suspects, ())
        if clean and self._own is not None:
            await journal.remove([self._own[0]])
        await answered(journal.flush(), self._seconds)
