"""What one member knows of one partition: which records it has, which it handed out, which are finished.

Pure state: nothing here awaits, and time is what the caller says.  Which record goes out next is the shared window's
business; this one knows offsets, and promises that its progress can be written down at any moment so that whoever reads
it goes on where this member was.  Fetching, committing and the group are the membership's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reliamq.spi import Entry, Room, Window
from reliamq_kafka.delays.delayed import attempts_of, may_return
from reliamq_kafka.wire.progress import MAX_MARKS, Attempts, Progress
from reliamq_kafka.wire.records import Record

__all__ = ["PartitionWindow", "Times", "entry_of", "now"]

STRIDE = 1_000
"""How far beyond what is handed out the limit is committed, so that few hand-outs wait for a commit."""
ROOM_RECORDS, ROOM_BYTES = 4_000, 16 * 1024 * 1024
"""Fetched and not handed out: above this nothing more is fetched, until it is half of it (C10)."""


def entry_of(record: Record) -> Entry[Record]:
    """A record as its window keeps it."""
    return Entry(record.offset, record.key, len(record.value or b"") + len(record.key or b""), record)


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


class PartitionWindow(Window[Record]):
    """One partition, from where its group is.

    group: whose.  restored: what it committed.  limit: hand-outs stay below it; whoever commits a higher one raises it.
    position: the offset to fetch next.  written: the version that was committed last.
    """

    def __init__(self, group: str, restored: Progress, times: Times) -> None:
        super().__init__()
        self._group = group
        self.position = restored.offset
        self.limit = restored.limit
        self._restored, self._restored_at = restored, times
        self._unfinished = frozenset(restored.unfinished)
        self._marked: dict[int, Entry[Record]] = {}  # those with attempts, wherever they are
        self._full = self._blocked = False
        self.written = 0

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
            entry = entry_of(record)
            if offset >= self._restored.limit and offset not in self._restored.attempts and not may_return(record):
                self.add(entry)
            else:
                self._restore(entry)

    def pass_over(self, position: int) -> None:
        """What is before this offset and did not come is none that will."""
        self.position = max(self.position, position)

    def _restore(self, entry: Entry[Record]) -> None:
        """Somebody had it before, here or before a long wait that it came back from."""
        written = self._restored.attempts.get(entry.position)
        known = written or attempts_of(entry.content.headers, self._group)
        entry.failures, entry.crashes, entry.apart = known.failures, known.crashes + known.begun, known.apart
        entry.due = self._restored_at.read(known.due)
        waits = entry.due > self._restored_at.monotonic  # then nobody has had it since its retry
        entry.redelivered = entry.position < self._restored.limit and not waits
        if written is not None:  # what the record itself carries need not be written down
            self._marked[entry.position] = entry
        # one that keeps its key's order waits behind what is before it of its key
        self.add(entry, waits=entry.apart or (waits and entry.key is None))

    # --- handing out -----------------------------------------------------------------------------------------------

    def take(self, room: Room[Record], *, now: float) -> Sequence[Entry[Record]]:
        """Hand out what may go and has room; what ``room`` has taken in all."""
        self._blocked = False
        return super().take(room, now=now)

    def may_go(self, entry: Entry[Record]) -> bool:
        """Whether whoever takes over after a crash would know that it may have been handed out."""
        if entry.position >= self.limit:
            self._blocked = True
            return False
        return True

    def may_be_new(self, entry: Entry[Record]) -> bool:
        """Whether its failure would fit into what is written down."""
        return len(self._marked) + len(self._handed) < MAX_MARKS or entry.position in self._marked

    @property
    def needs_limit(self) -> bool:
        """Whether the last :meth:`take` would have handed out more, had a commit raised the limit."""
        return self._blocked

    def note(self, entry: Entry[Record]) -> None:
        """Have its attempts written down, if there are any."""
        if entry.failures or entry.crashes or entry.begun or entry.apart or entry.due:
            self._marked[entry.position] = entry
        else:
            self._marked.pop(entry.position, None)

    def forget(self, entry: Entry[Record]) -> None:
        """It is finished."""
        self._marked.pop(entry.position, None)

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
        unfinished = [*self._handed, *(entry.position for entry in self.back())]
        known = self._ready[0].position if self._ready else self.position
        if known < self._restored.known:  # there are finished ones among what comes next
            known = self._restored.known
            unfinished += (entry.position for entry in self._ready if entry.position < known)
            unfinished += (offset for offset in self._restored.unfinished if offset >= self.position)
        return known, sorted(offset for offset in unfinished if offset < known)

    def _next_limit(self, known: int) -> int:
        alone = max((entry.position for _, _, entry in self._alone), default=0) if self._blocked else 0
        return max(self.limit, known + STRIDE, alone + 1)

    def _suspicious(self, offset: int) -> int:
        """Up to where records may have been in a process that died."""
        left = self._restored.limit if self.position < self._restored.limit else offset
        return max([offset, left, *(entry.position + 1 for entry in self.entries() if entry.redelivered)])

    def _attempts(self, times: Times, closing: bool) -> dict[int, Attempts]:
        attempts = {place: one for place, one in self._restored.attempts.items() if place >= self.position}
        for place, entry in self._marked.items():
            begun = entry.begun and not closing
            due = times.written(entry.due)
            attempts[place] = Attempts(entry.failures, entry.crashes, begun, entry.apart, due)
        return attempts
