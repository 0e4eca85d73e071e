"""What one member knows of one lane: which entries it has, which it handed out, which are finished, and what must be
written down of the others.

Pure state: nothing here awaits.  Which message goes out next is the shared window's business; this one knows entries'
ids and attempts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reliamq.spi import Entry, Message, Retry, Window
from reliamq_redis.wire.attempts import NONE, Attempts
from reliamq_redis.wire.records import fields_of

__all__ = ["Changes", "Held", "LaneWindow", "order_of"]

ROOM_BYTES = 16 * 1024 * 1024
"""Fetched and not handed out: above this nothing more is fetched."""
FIRST_TAKEN = 16


@dataclass(slots=True)
class Held:
    """A message of the lane.  id: of its entry.  ours: reliamq wrote it, so that it can be written again."""

    message: Message
    id: str
    ours: bool


@dataclass(slots=True)
class Changes:
    """What must be written down.

    finished: ids of entries.  forgotten: ids whose attempts may go.  attempts: by id.
    away: what goes away for a while: id, milliseconds, and as what it comes back.
    """

    finished: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    attempts: dict[str, Attempts] = field(default_factory=dict)
    away: list[tuple[str, int, Sequence[str | bytes]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.finished or self.forgotten or self.attempts or self.away)


class LaneWindow(Window[Held]):
    """One lane.

    group: whose.  restored: attempts by entry, as they were found.
    died: the member before died; everything that it had may have been in its process.
    suspect: up to which entry somebody may have died over before that.
    wall_ahead: seconds by which the wall clock, that is written down, is ahead of the monotonic one.
    prefetch: most that is here, handled or not.
    """

    def __init__(
        self,
        group: str,
        restored: Mapping[str, Attempts],
        *,
        died: bool,
        suspect: str,
        wall_ahead: float,
        prefetch: int,
    ) -> None:
        super().__init__()
        self._group, self._died, self._suspect = group, died, order_of(suspect)
        self._wall_ahead, self._prefetch = wall_ahead, prefetch
        self._restored, self._recorded = dict(restored), set(restored)
        self._positions = itertools.count(1)
        self._unfinished = self._largest = 0
        self._changed: dict[str, Entry[Held]] = {}
        self._owed = Changes()

    # --- what comes ------------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more may be here (C10); few while nothing is known of their sizes."""
        if self._kept_bytes >= ROOM_BYTES:
            return 0
        fitting = (ROOM_BYTES - self._kept_bytes) // self._largest if self._largest else FIRST_TAKEN
        return min(max(1, fitting), max(0, self._prefetch - self._unfinished))

    def take_in(self, held: Held, carried: Attempts, *, came_back: bool, now: float) -> None:
        """An entry.

        carried: the attempts that it brings along.  came_back: somebody had it before.  now: monotonic.
        """
        written = self._restored.pop(held.id, None)
        entry = Entry(next(self._positions), held.message.key, held.message.size, held)
        known = written or carried
        entry.failures, entry.crashes, entry.apart = known.failures, known.crashes, known.apart
        entry.crashes += self._died and known.begun
        due = known.due / 1000 - self._wall_ahead
        waits = due > now  # then nobody has had it since its retry
        entry.due = due if waits else 0.0
        entry.redelivered = came_back and not waits and self._is_suspect(held.id, written)
        self._unfinished += 1
        self._largest = max(self._largest, entry.size)
        self.add(entry, waits=entry.apart or (waits and entry.key is None))
        if written is not None and (self._died or written.begun):
            self.note(entry)  # what has ended with a process, or with a lane that was lost, is known from now on

    def _is_suspect(self, name: str, written: Attempts | None) -> bool:
        """Whether it may have been in a process that died."""
        if self._died:
            return True
        return written.redelivered if written is not None else order_of(name) <= self._suspect

    def pass_over(self, name: str) -> None:
        """An entry that is not for this group, or that is gone."""
        self._owed.finished.append(name)

    def all_came(self) -> None:
        """All that somebody had before was taken in; attempts that are left are of what is gone."""
        self._owed.forgotten += self._restored
        self._restored.clear()

    # --- what is written down --------------------------------------------------------------------------------------

    def note(self, entry: Entry[Held]) -> None:
        """Have its attempts written down, or struck out where there are none."""
        self._changed[entry.content.id] = entry

    def forget(self, entry: Entry[Held]) -> None:
        """It is finished."""
        name = entry.content.id
        self._owed.finished.append(name)
        self._leaves(name)
        if name in self._recorded:
            self._owed.forgotten.append(name)
            self._recorded.discard(name)

    def _leaves(self, name: str) -> None:
        self._changed.pop(name, None)
        self._unfinished -= 1

    def send_away(self, entry: Entry[Held], retry: Retry) -> None:
        """It gives way for long, and holds no room here meanwhile (C6)."""
        self._unhand(entry)
        attempts = Attempts(entry.failures + retry.counts, entry.crashes, apart=True)
        fields = fields_of(entry.content.message, {"attempts": attempts.text(), "for": self._group})
        self._owed.away.append((entry.content.id, int(retry.delay.total_seconds() * 1000), fields))
        self._leaves(entry.content.id)
        self._recorded.discard(entry.content.id)

    def changes(self) -> Changes:
        """What must be written down.  It is not told again."""
        owed, self._owed = self._owed, Changes()
        changed, self._changed = self._changed, {}
        for name, entry in changed.items():
            attempts = self._attempts(entry)
            if attempts != NONE:
                owed.attempts[name] = attempts
                self._recorded.add(name)
            elif name in self._recorded:
                owed.forgotten.append(name)
                self._recorded.discard(name)
        return owed

    def not_written(self, changes: Changes) -> None:
        """Have these told again, unless something newer is told."""
        newer = self._owed
        unfinished = {entry.content.id: entry for entry in self.entries()}
        for name in (*changes.attempts, *changes.forgotten):
            if name in unfinished:
                self._changed.setdefault(name, unfinished[name])
                self._recorded.add(name)  # perhaps it is: nobody knows what of it was written
        forgotten = [name for name in (*changes.forgotten, *changes.attempts) if name not in unfinished]
        self._owed = Changes(
            finished=changes.finished + newer.finished,
            forgotten=forgotten + newer.forgotten,
            away=changes.away + newer.away,
        )

    @property
    def owes(self) -> bool:
        """Whether something is to be written down."""
        return bool(self._owed or self._changed)

    def release_all(self) -> None:
        """Nobody works on anything any more: all is given back as if it had never been handed out."""
        for entry in list(self._handed.values()):
            if self.held(entry.position, entry.hand) is not None:
                self.release(entry)

    def _attempts(self, entry: Entry[Held]) -> Attempts:
        return Attempts(
            failures=entry.failures,
            crashes=entry.crashes,
            begun=entry.begun,
            apart=entry.apart,
            due=int((entry.due + self._wall_ahead) * 1000) + 1 if entry.due else 0,
            redelivered=entry.redelivered,
        )


def order_of(name: str) -> tuple[int, int]:
    """An entry's id as Redis orders it: milliseconds and a number."""
    time, _, number = name.partition("-")
    return int(time), int(number or 0)
