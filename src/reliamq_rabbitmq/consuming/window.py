"""What one member knows of one lane: which messages it has, which it handed out, which are to be acknowledged, and what
must be written into the lane's ledger.

Pure state: nothing here awaits.  Which message goes out next is the shared window's business; this one knows delivery
tags and attempts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reliamq.spi import Entry, Message, Watermark, Window
from reliamq_rabbitmq.wire.attempts import Attempts
from reliamq_rabbitmq.wire.channel import Received

__all__ = ["Held", "LaneWindow"]

ON_ITS_WAY = 0


@dataclass(slots=True)
class Held:
    """A message of the lane.

    tag: its delivery's; ON_ITS_WAY while it is renewed.  since: when that came, monotonic.
    """

    message: Message
    received: Received
    tag: int
    since: float


class LaneWindow(Window[Held]):
    """One lane.

    wall_ahead: seconds by which the wall clock, that is written down, is ahead of the monotonic one.
    suspicious: a member of it died; what the broker gave out before may have been in its process.
    """

    def __init__(self, restored: Mapping[str, Attempts], *, suspicious: bool, wall_ahead: float) -> None:
        super().__init__()
        self._wall_ahead = wall_ahead
        self._restored, self._suspicious = dict(restored), suspicious
        self._positions = itertools.count(1)
        self._watermark = Watermark()
        self._renewing: dict[str, list[Entry[Held]]] = {}
        self._finished: list[int] = []
        self._changed: dict[str, Entry[Held]] = {}
        self._ended: list[str] = []
        self._late: list[Entry[Held]] = []  # came while others were renewed
        self._gone: set[int] = set()  # finished while they were renewed
        self.caught_up = False
        """Something came that nobody had before: all that came back has come."""

    # --- what comes ------------------------------------------------------------------------------------------------

    def take_in(self, received: Received, message: Message, carried: Attempts, *, now: float) -> bool:
        """A delivery; whether it must be renewed.  carried: the attempts that it brings along.  now: monotonic."""
        self._watermark.deliver(received.tag)
        if received.redelivered and self._renewed(received, message, now):
            return False
        if not received.redelivered and not self.caught_up:
            self.caught_up = True
            self._ended += self._restored  # of messages that are gone
            self._restored.clear()
        entry = Entry(next(self._positions), message.key, message.size, Held(message, received, received.tag, now))
        written = self._restored.pop(message.id, None)
        known = written or carried
        entry.failures, entry.crashes, entry.apart = known.failures, known.crashes + known.begun, known.apart
        due = known.due - self._wall_ahead
        waits = due > now  # then nobody has had it since its retry
        entry.due = due if waits else 0.0
        entry.redelivered = not waits and ((self._suspicious and received.redelivered) or known.redelivered)
        if self._renewing:
            self._late.append(entry)
        self.add(entry, waits=entry.apart or (waits and entry.key is None))
        return bool(self._late)

    # --- what goes to the broker -----------------------------------------------------------------------------------

    def note(self, entry: Entry[Held]) -> None:
        """Have its attempts written down, or struck out where there are none."""
        self._changed[entry.content.message.id] = entry

    def forget(self, entry: Entry[Held]) -> None:
        """It is finished."""
        self._acknowledge(entry)
        self._changed.pop(entry.content.message.id, None)
        self._ended.append(entry.content.message.id)

    def _acknowledge(self, entry: Entry[Held]) -> None:
        if entry.content.tag == ON_ITS_WAY:
            self._gone.add(entry.position)
        else:
            self._finished.append(entry.content.tag)
            self._watermark.finish(entry.content.tag)

    def acks(self) -> tuple[int | None, Sequence[int]]:
        """What is finished and not acknowledged: all up to a tag, and these.  They are not told again."""
        mark = self._watermark.advance() or 0
        finished, self._finished = self._finished, []
        below = [tag for tag in finished if tag <= mark]
        # The tag itself must be one that is not acknowledged yet (AMQP 0-9-1, basic.ack: precondition-failed)
        return (max(below) if below else None), [tag for tag in finished if tag > mark]

    def changes(self) -> tuple[Mapping[str, Attempts], Sequence[str]]:
        """What must be written into the ledger, and whose records may go.  They are not told again."""
        changed, self._changed = self._changed, {}
        ended, self._ended = self._ended, []
        attempts = {name: self._attempts(entry) for name, entry in changed.items()}
        none = Attempts()
        ended += [name for name, one in attempts.items() if one == none]
        return {name: one for name, one in attempts.items() if one != none}, ended

    def not_written(self, changed: Iterable[str], ended: Sequence[str]) -> None:
        """Have these told again: the ledger does not have them yet."""
        entries = {entry.content.message.id: entry for entry in self.entries()}
        for name in changed:
            if name in entries:
                self._changed.setdefault(name, entries[name])
        self._ended += ended

    @property
    def owes(self) -> bool:
        """Whether more may come that a member had which died."""
        return self._suspicious and not self.caught_up

    def release_all(self) -> None:
        """Nobody works on anything any more: all is given back as if it had never been handed out."""
        for entry in list(self._handed.values()):
            if self.held(entry.position, entry.hand) is not None:
                self.release(entry)

    def suspects(self) -> Mapping[str, Attempts]:
        """Of what is unfinished, that which a process may have started on that died: for whoever comes next."""
        return {
            entry.content.message.id: self._attempts(entry) for entry in self.entries() if entry.redelivered
        } | self._restored

    # --- renewing --------------------------------------------------------------------------------------------------

    def to_renew(self, before: float) -> Sequence[int]:
        """If anything unfinished came before that: tags of all that is unfinished, in order.

        They are given back, and come again at once with new tags; meanwhile their work goes on.  All, because after a
        crash the broker gives them out in the order of their tags.
        """
        entries = sorted(entry for entry in self.entries() if entry.content.tag != ON_ITS_WAY)
        if not any(entry.content.since < before for entry in entries):
            return ()
        return [self._renew(entry) for entry in entries]

    def behind_renewed(self) -> Sequence[int]:
        """Tags of what came while others were on their way, and must come after them.  Not told again."""
        behind, self._late = self._late, []
        return [self._renew(entry) for entry in behind if entry.content.tag != ON_ITS_WAY and not self._is_over(entry)]

    def _is_over(self, entry: Entry[Held]) -> bool:
        return entry.content.tag in self._finished

    def _renew(self, entry: Entry[Held]) -> int:
        tag, entry.content.tag = entry.content.tag, ON_ITS_WAY
        self._renewing.setdefault(entry.content.message.id, []).append(entry)
        self._watermark.finish(tag)
        return tag

    def _renewed(self, received: Received, message: Message, now: float) -> bool:
        renewing = self._renewing.get(message.id)
        if not renewing:
            return False
        entry = renewing.pop(0)
        if not renewing:
            del self._renewing[message.id]
        entry.content.tag, entry.content.since = received.tag, now
        if entry.position in self._gone:  # finished meanwhile
            self._gone.discard(entry.position)
            self._acknowledge(entry)
        return True

    def _attempts(self, entry: Entry[Held]) -> Attempts:
        return Attempts(
            failures=entry.failures,
            crashes=entry.crashes,
            begun=entry.begun,
            apart=entry.apart,
            due=entry.due + self._wall_ahead if entry.due else 0.0,
            redelivered=entry.redelivered,
        )
