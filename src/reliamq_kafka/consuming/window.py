"""What one member knows of one partition: which records it has, which it handed out, which are finished.

Pure state: nothing here awaits, and time is what the caller says.  It promises that a key's records are handed out in
order (C3), that what comes back keeps its attempts (C4), and that its progress can be written down at any moment so
that whoever reads it goes on where this member was.  Fetching, committing and the group are the membership's.

A record is *ready* (fetched, not handed out yet), *handed* out, or *back*: given back, or waiting for its retry.  What
is back waits in the hold of its key, by offset, and everything later of the key waits behind it; what has no key, or
gave way to its key's others, waits on its own.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from reliamq_kafka.delays.delayed import attempts_of, may_return
from reliamq_kafka.wire.progress import MAX_MARKS, Attempts, Progress
from reliamq_kafka.wire.records import Record

__all__ = ["Entry", "Room", "Times", "Window", "now"]

STRIDE = 1_000
"""How far beyond what is handed out the limit is committed, so that few hand-outs wait for a commit."""
ROOM_RECORDS, ROOM_BYTES = 4_000, 16 * 1024 * 1024
"""Fetched and not handed out: above this nothing more is fetched, until it is half of it (C10)."""


class Entry:
    """One record that is not finished.

    hand: number of its hand-out; 0: it is not handed out.  until: when that lease ends.  due: when it may go out.
    started: its handler was allowed to start.  begun: that is written down.
    """

    __slots__ = (
        "apart",
        "begun",
        "crashes",
        "due",
        "failures",
        "hand",
        "offset",
        "record",
        "redelivered",
        "size",
        "started",
        "until",
    )

    def __init__(self, record: Record) -> None:
        self.record, self.offset = record, record.offset
        self.size = len(record.value or b"") + len(record.key or b"")
        self.failures = self.crashes = self.hand = 0
        self.started = self.begun = self.apart = self.redelivered = False
        self.due = self.until = 0.0

    @property
    def key(self) -> bytes | None:
        """The key whose order it keeps; one that gave way keeps none."""
        return None if self.apart else self.record.key

    def __lt__(self, other: Entry) -> bool:
        return self.offset < other.offset


class _Hold:
    """The records of one key that are back, and what came after.  out: how many of the key are handed out."""

    __slots__ = ("entries", "out")

    def __init__(self, out: int) -> None:
        self.entries: list[Entry] = []
        self.out = out


class Room:
    """What is handed out at once: at most ``limit``, and ``max_bytes``, but one even if that is larger.

    until: when the leases end.  hands: numbers of hand-outs.
    """

    __slots__ = ("hands", "limit", "max_bytes", "taken", "until")

    def __init__(self, limit: int, max_bytes: int, until: float, hands: Iterator[int]) -> None:
        self.limit, self.max_bytes, self.until, self.hands = limit, max_bytes, until, hands
        self.taken: list[Entry] = []

    def admits(self, entry: Entry) -> bool:
        """Whether it fits; the first does, however large."""
        return not self.taken or (len(self.taken) < self.limit and entry.size <= self.max_bytes)

    def take(self, entry: Entry) -> None:
        """It goes out."""
        self.max_bytes -= entry.size
        self.taken.append(entry)
        entry.hand, entry.until = next(self.hands), self.until


@dataclass(frozen=True, slots=True)
class Times:
    """Now, by two clocks: monotonic seconds for leases and delays, wall-clock seconds for what is written down."""

    monotonic: float
    wall: float

    def written(self, due: float) -> int:
        """A moment as it is committed: tenths of a second; 0 for one that is over."""
        return 0 if due <= self.monotonic else int((due - self.monotonic + self.wall) * 10) + 1

    def read(self, due: int) -> float:
        """A committed moment by the monotonic clock."""
        return 0.0 if not due else self.monotonic + max(0.0, due / 10 - self.wall)


def now() -> Times:
    """This moment."""
    return Times(time.monotonic(), time.time())


class Window:
    """One partition, from where its group is.

    group: whose.  restored: what it committed.  limit: hand-outs stay below it; whoever commits a higher one raises it.
    position: the offset to fetch next.
    version: grows with each delivery that ends.  written: the version that was committed last.
    """

    def __init__(self, group: str, restored: Progress, times: Times) -> None:
        self._group = group
        self.position = restored.offset
        self.limit = restored.limit
        self._restored, self._restored_at = restored, times
        self._unfinished = frozenset(restored.unfinished)
        self._ready: deque[Entry] = deque()
        self._handed: dict[int, Entry] = {}
        self._holds: dict[bytes, _Hold] = {}
        self._alone: list[tuple[float, int, Entry]] = []
        self._marked: dict[int, Entry] = {}  # those with attempts, wherever they are
        self._kept = self._kept_bytes = 0  # what is not handed out
        self._full = self._blocked = False
        self.version = self.written = 0

    # --- fetching --------------------------------------------------------------------------------------------------

    def wants_more(self) -> bool:
        """Whether there is room for what is fetched next (C10)."""
        share = 0.5 if self._full else 1.0
        self._full = self._kept > ROOM_RECORDS * share or self._kept_bytes > ROOM_BYTES * share
        return not self._full

    def fetched(self, records: Iterable[Record]) -> None:
        """Take in what was fetched; what is here already, or finished, is skipped."""
        for record in records:
            offset = record.offset
            if offset < self.position:
                continue
            self.position = offset + 1
            if offset < self._restored.known and offset not in self._unfinished:
                continue
            entry = Entry(record)
            self._keep(entry)
            if offset >= self._restored.limit and offset not in self._restored.attempts and not may_return(record):
                self._ready.append(entry)
            else:
                self._restore(entry)

    def _restore(self, entry: Entry) -> None:
        """Somebody had it before, here or before a long wait that it came back from."""
        written = self._restored.attempts.get(entry.offset)
        known = written or attempts_of(entry.record.headers, self._group)
        entry.failures, entry.crashes, entry.apart = known.failures, known.crashes + known.begun, known.apart
        entry.due = self._restored_at.read(known.due)
        waits = entry.due > self._restored_at.monotonic  # then nobody has had it since its retry
        entry.redelivered = entry.offset < self._restored.limit and not waits
        if written is not None:  # what the record itself carries need not be written down
            self._marked[entry.offset] = entry
        if entry.apart or (waits and entry.key is None):
            self._put_back(entry)
        else:
            self._ready.append(entry)  # also one that waits, behind what is before it of its key

    # --- handing out -----------------------------------------------------------------------------------------------

    def take(self, room: Room, *, now: float) -> Sequence[Entry]:
        """Hand out what may go and has room; what ``room`` has taken in all."""
        self._blocked = False
        self._take_alone(room, now)
        for key in list(self._holds):
            self._take_held(key, room, now)
        self._take_ready(room, now)
        return room.taken

    def _hand(self, entry: Entry, room: Room) -> None:
        room.take(entry)
        self._handed[entry.offset] = entry
        self._kept -= 1
        self._kept_bytes -= entry.size

    def _take_alone(self, room: Room, now: float) -> None:
        while self._alone and self._alone[0][0] <= now and self._may_go(self._alone[0][2], room):
            self._hand(heapq.heappop(self._alone)[2], room)

    def _take_held(self, key: bytes, room: Room, now: float) -> None:
        hold = self._holds[key]
        if hold.out:  # somebody works on the key: what comes after waits for how that ends
            return
        while hold.entries and hold.entries[0].due <= now and self._may_go(hold.entries[0], room):
            self._hand(hold.entries.pop(0), room)
            hold.out += 1
        if not hold.entries:
            del self._holds[key]

    def _take_ready(self, room: Room, now: float) -> None:
        ready = self._ready
        while ready and self._may_go(ready[0], room):
            if len(self._marked) + len(self._handed) >= MAX_MARKS and ready[0].offset not in self._marked:
                return  # what fails must fit into what is written down
            entry = ready.popleft()
            if entry.due > now or (self._holds and entry.record.key in self._holds):
                self._put_back(entry)
            else:
                self._hand(entry, room)

    def _may_go(self, entry: Entry, room: Room) -> bool:
        if entry.offset >= self.limit:
            self._blocked = True
            return False
        return room.admits(entry)

    @property
    def needs_limit(self) -> bool:
        """Whether the last :meth:`take` would have handed out more, had a commit raised the limit."""
        return self._blocked

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

    def held(self, offset: int, hand: int) -> Entry | None:
        """The entry, if this hand-out of it is the newest and not settled."""
        entry = self._handed.get(offset)
        return entry if entry is not None and entry.hand == hand else None

    def begin(self, entry: Entry) -> None:
        """A handler is about to start."""
        entry.begun = True
        self._marked[entry.offset] = entry

    def finish(self, entry: Entry) -> None:
        """Its effect is durable."""
        self._unhand(entry)
        self._marked.pop(entry.offset, None)

    def retry(self, entry: Entry, *, due: float, apart: bool, counts: bool) -> None:
        """An attempt failed.  What its key has handed out behind it comes back too, unless it gives way, now or before:
        its key has gone on since.
        """
        self._unhand(entry)
        entry.failures += counts
        entry.due, entry.apart = due, entry.apart or apart
        entry.begun = entry.redelivered = False
        self._back(entry, self._behind(entry))

    def release(self, entry: Entry) -> None:
        """Given back unhandled, with what its key has handed out behind it."""
        self._unhand(entry)
        entry.begun = False
        self._back(entry, self._behind(entry))

    def expire(self, now: float) -> Sequence[Entry]:
        """Take back what was neither settled nor extended in its lease, and what is behind it (C2); which."""
        lost: list[Entry] = []
        for entry in [entry for entry in self._handed.values() if entry.until <= now]:
            if entry.hand:  # else it was behind another
                self._unhand(entry)
                lost += (entry, *self._behind(entry))
        for entry in lost:
            entry.crashes += entry.begun
            entry.begun, entry.redelivered = False, True
            self._back(entry, ())
        return lost

    def _unhand(self, entry: Entry) -> None:
        self.version += 1
        entry.hand, entry.started = 0, False
        del self._handed[entry.offset]
        hold = self._holds.get(entry.key) if self._holds and entry.key is not None else None
        if hold is not None:
            hold.out -= 1

    def _behind(self, entry: Entry) -> Sequence[Entry]:
        """What its key has handed out after it; handed out no more."""
        if entry.key is None:
            return ()
        behind = [other for other in self._handed.values() if other.key == entry.key and entry < other]
        for other in behind:
            self._unhand(other)
        return behind

    def _back(self, entry: Entry, behind: Sequence[Entry]) -> None:
        for one in (entry, *behind):
            one.begun = False
            self._keep(one)
            self._mark(one)
            self._put_back(one)

    def _put_back(self, entry: Entry) -> None:
        if entry.key is None:
            heapq.heappush(self._alone, (entry.due, entry.offset, entry))
            return
        hold = self._holds.get(entry.key)
        if hold is None:
            out = sum(other.key == entry.key for other in self._handed.values())
            hold = self._holds[entry.key] = _Hold(out)
        insort(hold.entries, entry)

    def _keep(self, entry: Entry) -> None:
        self._kept += 1
        self._kept_bytes += entry.size

    def _mark(self, entry: Entry) -> None:
        if entry.failures or entry.crashes or entry.begun or entry.apart or entry.due:
            self._marked[entry.offset] = entry
        else:
            self._marked.pop(entry.offset, None)

    # --- what is written down --------------------------------------------------------------------------------------

    def progress(self, times: Times, *, closing: bool = False) -> Progress:
        """Where the group is.

        closing: nobody works on anything any more, and what is handed out is given back as if it had never been.
        """
        known, unfinished = self._accounted()
        offset = unfinished[0] if unfinished else known
        return Progress(
            offset=offset,
            known=known,
            limit=self._suspicious(offset) if closing else self._next_limit(known),
            unfinished=unfinished,
            attempts=self._attempts(times, closing),
        )

    def _accounted(self) -> tuple[int, list[int]]:
        """Up to where each record is accounted for, and which of those are unfinished."""
        unfinished = [*self._handed, *(entry.offset for _, _, entry in self._alone)]
        for hold in self._holds.values():
            unfinished += (entry.offset for entry in hold.entries)
        known = self._ready[0].offset if self._ready else self.position
        if known < self._restored.known:  # there are finished ones among what comes next
            known = self._restored.known
            unfinished += (entry.offset for entry in self._ready if entry.offset < known)
            unfinished += (offset for offset in self._restored.unfinished if offset >= self.position)
        return known, sorted(offset for offset in unfinished if offset < known)

    def _next_limit(self, known: int) -> int:
        alone = max((entry.offset for _, _, entry in self._alone), default=0) if self._blocked else 0
        return max(self.limit, known + STRIDE, alone + 1)

    def _suspicious(self, offset: int) -> int:
        """Up to where records may have been in a process that died."""
        left = self._restored.limit if self.position < self._restored.limit else offset
        entries = [*self._handed.values(), *self._ready, *(entry for _, _, entry in self._alone)]
        for hold in self._holds.values():
            entries += hold.entries
        return max([offset, left, *(entry.offset + 1 for entry in entries if entry.redelivered)])

    def _attempts(self, times: Times, closing: bool) -> dict[int, Attempts]:
        attempts = {place: one for place, one in self._restored.attempts.items() if place >= self.position}
        for place, entry in self._marked.items():
            begun = entry.begun and not closing
            due = times.written(entry.due)
            attempts[place] = Attempts(entry.failures, entry.crashes, begun, entry.apart, due)
        return attempts
