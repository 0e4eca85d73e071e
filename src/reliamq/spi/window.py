"""What a member holds of one share of a group's messages (a partition, a lane) that is its own for a while.

For a backend whose broker gives out whole shares and leaves the rest to the client: which message goes out next, what
waits behind what, whose lease ran out.  Pure state: nothing here awaits, and time is what the caller says.  It promises
that a key's messages are handed out in order (C3) and that what comes back keeps its attempts (C4).  Fetching, and
writing down what must survive, are the backend's.

A message is *ready* (here, not handed out yet), *handed* out, or *back*: given back, or waiting for its retry.  What
is back waits in the hold of its key, by position, and everything later of the key waits behind it; what has no key, or
gave way to its key's others, waits on its own.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

__all__ = ["Entry", "Room", "Window"]

Content = TypeVar("Content")


class Entry(Generic[Content]):
    """One message that is not finished.

    position: its place in the share; grows.  content: what the backend keeps of it.  size: bytes that count.
    hand: number of its hand-out; 0: it is not handed out.  until: when that lease ends.  due: when it may go out.
    started: its handler was allowed to start.  begun: that is written down.
    """

    __slots__ = (
        "_key",
        "apart",
        "begun",
        "content",
        "crashes",
        "due",
        "failures",
        "hand",
        "position",
        "redelivered",
        "size",
        "started",
        "until",
    )

    def __init__(self, position: int, key: bytes | None, size: int, content: Content) -> None:
        self.position, self._key, self.size, self.content = position, key, size, content
        self.failures = self.crashes = self.hand = 0
        self.started = self.begun = self.apart = self.redelivered = False
        self.due = self.until = 0.0

    @property
    def key(self) -> bytes | None:
        """The key whose order it keeps; one that gave way keeps none."""
        return None if self.apart else self._key

    def __lt__(self, other: Entry[Content]) -> bool:
        return self.position < other.position


class _Hold(Generic[Content]):
    """The messages of one key that are back, and what came after.  out: how many of the key are handed out."""

    __slots__ = ("entries", "out")

    def __init__(self, out: int) -> None:
        self.entries: list[Entry[Content]] = []
        self.out = out


class Room(Generic[Content]):
    """What is handed out at once: at most ``limit``, and ``max_bytes``, but one even if that is larger.

    until: when the leases end.  hands: numbers of hand-outs.
    """

    __slots__ = ("hands", "limit", "max_bytes", "taken", "until")

    def __init__(self, limit: int, max_bytes: int, until: float, hands: Iterator[int]) -> None:
        self.limit, self.max_bytes, self.until, self.hands = limit, max_bytes, until, hands
        self.taken: list[Entry[Content]] = []

    def admits(self, entry: Entry[Content]) -> bool:
        """Whether it fits; the first does, however large."""
        return not self.taken or (len(self.taken) < self.limit and entry.size <= self.max_bytes)

    def take(self, entry: Entry[Content]) -> None:
        """It goes out."""
        self.max_bytes -= entry.size
        self.taken.append(entry)
        entry.hand, entry.until = next(self.hands), self.until


class Window(Generic[Content]):
    """One share.

    version: grows with each delivery that ends.
    A subclass may keep back what could not be written down (:meth:`may_go`, :meth:`may_be_new`), and hears of each
    message whose attempts must be (:meth:`note`, :meth:`forget`).
    """

    def __init__(self) -> None:
        self._ready: deque[Entry[Content]] = deque()
        self._handed: dict[int, Entry[Content]] = {}
        self._holds: dict[bytes, _Hold[Content]] = {}
        self._alone: list[tuple[float, int, Entry[Content]]] = []
        self._kept = self._kept_bytes = 0  # what is not handed out
        self.version = 0

    # --- what a subclass decides -----------------------------------------------------------------------------------

    def may_go(self, entry: Entry[Content]) -> bool:
        """Whether it may be handed out at all."""
        return True

    def may_be_new(self, entry: Entry[Content]) -> bool:
        """Whether one more that was not handed out before may be."""
        return True

    def note(self, entry: Entry[Content]) -> None:
        """Its attempts, or when it is due, are otherwise than before."""

    def forget(self, entry: Entry[Content]) -> None:
        """It is finished."""

    # --- what comes ------------------------------------------------------------------------------------------------

    def add(self, entry: Entry[Content], *, waits: bool = False) -> None:
        """Take in a message, later than all before it.

        waits: it gave way, or has no key, and is not due: it waits on its own.  One that keeps its key's order waits
        in its turn.
        """
        self._keep(entry)
        if waits:
            self._put_back(entry)
        else:
            self._ready.append(entry)

    def entries(self) -> Iterator[Entry[Content]]:
        """All that is not finished, in no order."""
        yield from self._ready
        yield from self._handed.values()
        yield from self.back()

    def back(self) -> Iterator[Entry[Content]]:
        """All that is back."""
        for _, _, entry in self._alone:
            yield entry
        for hold in self._holds.values():
            yield from hold.entries

    # --- handing out -----------------------------------------------------------------------------------------------

    def take(self, room: Room[Content], *, now: float) -> Sequence[Entry[Content]]:
        """Hand out what may go and has room; what ``room`` has taken in all."""
        self._take_alone(room, now)
        for key in list(self._holds):
            self._take_held(key, room, now)
        self._take_ready(room, now)
        return room.taken

    def _hand(self, entry: Entry[Content], room: Room[Content]) -> None:
        room.take(entry)
        self._handed[entry.position] = entry
        self._kept -= 1
        self._kept_bytes -= entry.size

    def _take_alone(self, room: Room[Content], now: float) -> None:
        while self._alone and self._alone[0][0] <= now and self._goes(self._alone[0][2], room):
            self._hand(heapq.heappop(self._alone)[2], room)

    def _take_held(self, key: bytes, room: Room[Content], now: float) -> None:
        hold = self._holds[key]
        if hold.out:  # somebody works on the key: what comes after waits for how that ends
            return
        while hold.entries and hold.entries[0].due <= now and self._goes(hold.entries[0], room):
            self._hand(hold.entries.pop(0), room)
            hold.out += 1
        if not hold.entries:
            del self._holds[key]

    def _take_ready(self, room: Room[Content], now: float) -> None:
        ready = self._ready
        while ready and self._goes(ready[0], room) and self.may_be_new(ready[0]):
            entry = ready.popleft()
            if entry.due > now or (self._holds and entry.key in self._holds):
                self._put_back(entry)
            else:
                self._hand(entry, room)

    def _goes(self, entry: Entry[Content], room: Room[Content]) -> bool:
        return self.may_go(entry) and room.admits(entry)

    def next_due(self) -> float | None:
        """When something that waits may go out; None: nothing waits."""
        dues = [hold.entries[0].due for hold in self._holds.values() if hold.entries and not hold.out]
        if self._alone:
            dues.append(self._alone[0][0])
        return min(dues, default=None)

    # --- what is handed out ----------------------------------------------------------------------------------------

    @property
    def handed(self) -> int:
        """How many are handed out and not settled."""
        return len(self._handed)

    @property
    def started(self) -> bool:
        """Whether a handler was allowed to start on anything that is handed out."""
        return any(entry.started for entry in self._handed.values())

    def held(self, position: int, hand: int) -> Entry[Content] | None:
        """The entry, if this hand-out of it is the newest and not settled."""
        entry = self._handed.get(position)
        return entry if entry is not None and entry.hand == hand else None

    def begin(self, entry: Entry[Content]) -> None:
        """A handler is about to start."""
        entry.begun = True
        self.note(entry)

    def finish(self, entry: Entry[Content]) -> None:
        """Its effect is durable."""
        self._unhand(entry)
        self.forget(entry)

    def retry(self, entry: Entry[Content], *, due: float, apart: bool, counts: bool) -> None:
        """An attempt failed.  What its key has handed out behind it comes back too, unless it gives way, now or before:
        its key has gone on since.
        """
        self._unhand(entry)
        entry.failures += counts
        entry.due, entry.apart = due, entry.apart or apart
        entry.begun = entry.redelivered = False
        self._back(entry, self._behind(entry))

    def release(self, entry: Entry[Content]) -> None:
        """Given back unhandled, with what its key has handed out behind it."""
        self._unhand(entry)
        entry.begun = False
        self._back(entry, self._behind(entry))

    def expire(self, now: float) -> Sequence[Entry[Content]]:
        """Take back what was neither settled nor extended in its lease, and what is behind it (C2); which."""
        lost: list[Entry[Content]] = []
        for entry in [entry for entry in self._handed.values() if entry.until <= now]:
            if entry.hand:  # else it was behind another
                self._unhand(entry)
                lost += (entry, *self._behind(entry))
        for entry in lost:
            entry.crashes += entry.begun
            entry.begun, entry.redelivered = False, True
            self._back(entry, ())
        return lost

    def _unhand(self, entry: Entry[Content]) -> None:
        self.version += 1
        entry.hand, entry.started = 0, False
        del self._handed[entry.position]
        hold = self._holds.get(entry.key) if self._holds and entry.key is not None else None
        if hold is not None:
            hold.out -= 1

    def _behind(self, entry: Entry[Content]) -> Sequence[Entry[Content]]:
        """What its key has handed out after it; handed out no more."""
        if entry.key is None:
            return ()
        behind = [other for other in self._handed.values() if other.key == entry.key and entry < other]
        for other in behind:
            self._unhand(other)
        return behind

    def _back(self, entry: Entry[Content], behind: Sequence[Entry[Content]]) -> None:
        for one in (entry, *behind):
            one.begun = False
            self._keep(one)
            self.note(one)
            self._put_back(one)

    def _put_back(self, entry: Entry[Content]) -> None:
        if entry.key is None:
            heapq.heappush(self._alone, (entry.due, entry.position, entry))
            return
        hold = self._holds.get(entry.key)
        if hold is None:
            out = sum(other.key == entry.key for other in self._handed.values())
            hold = self._holds[entry.key] = _Hold(out)
        insort(hold.entries, entry)

    def _keep(self, entry: Entry[Content]) -> None:
        self._kept += 1
        self._kept_bytes += entry.size
