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
from reliamq_rabbitmq.wire.attempts import NONE, Attempts
from reliamq_rabbitmq.wire.channel import Received

__all__ = ["Held", "LaneWindow"]

ON_ITS_WAY = 0


@dataclass(slots=True)
class Held:
    """A message of the lane.

    tag: its delivery's; ON_ITS_WAY while it is renewed.  since: when that came, monotonic.
    """

    message: Message
    tag: int
    since: float


class LaneWindow(Window[Held]):
    """One lane.

    restored: attempts by message, as they were found; more may be added while the ledger is still read.
    suspicious: a member of it died; what the broker gave out before may have been in its process.
    wall_ahead: seconds by which the wall clock, that is written down, is ahead of the monotonic one.
    """

    def __init__(self, restored: dict[str, Attempts], *, suspicious: bool, wall_ahead: float) -> None:
        super().__init__()
        self._restored, self.suspicious, self._wall_ahead = restored, suspicious, wall_ahead
        self._positions = itertools.count(1)
        self._watermark = Watermark()
        self._by_name: dict[str, list[Entry[Held]]] = {}  # unfinished; two where a message was published twice
        self._renewing: dict[str, list[Entry[Held]]] = {}
        self._gone: set[int] = set()  # finished while they were renewed
        self._finished: list[int] = []
        self._changed: dict[str, Entry[Held]] = {}
        self._ended: list[str] = []
        self.caught_up = False
        """Something came that nobody had before: all that came back has come."""

    # --- what comes ------------------------------------------------------------------------------------------------

    def take_in(self, received: Received, message: Message, carried: Attempts, *, now: float) -> bool:
        """A delivery; whether there is something to acknowledge by it.

        carried: the attempts that it brings along.  now: monotonic.
        """
        self._watermark.deliver(received.tag)
        if received.redelivered and (known := self._known(message.id)) is not None:
            return self._renewed(known, received.tag, now)
        if not received.redelivered and not self.caught_up:
            self.caught_up = True
            self._ended += self._restored  # of messages that are gone
            self._restored.clear()
        self._add(received, message, self._restored.pop(message.id, carried), now)
        return False

    def _known(self, name: str) -> Entry[Held] | None:
        """The unfinished entry that has come again: renewed, or taken back by the broker and given anew to this very
        consumer, of which it tells nobody.
        """
        renewing = self._renewing.get(name)
        if renewing:
            return renewing.pop(0)
        known = self._by_name.get(name) if self.caught_up else None
        return known[0] if known else None

    def _renewed(self, entry: Entry[Held], tag: int, now: float) -> bool:
        entry.content.tag, entry.content.since = tag, now
        if entry.position not in self._gone:
            return False
        self._gone.discard(entry.position)  # finished meanwhile
        self._acknowledge(entry)
        return True

    def _add(self, received: Received, message: Message, known: Attempts, now: float) -> None:
        entry = Entry(next(self._positions), message.key, message.size, Held(message, received.tag, now))
        entry.failures, entry.crashes, entry.apart = known.failures, known.crashes + known.begun, known.apart
        due = known.due - self._wall_ahead
        waits = due > now  # then nobody has had it since its retry
        entry.due = due if waits else 0.0
        entry.redelivered = not waits and ((self.suspicious and received.redelivered) or known.redelivered)
        self._by_name.setdefault(message.id, []).append(entry)
        self.add(entry, waits=entry.apart or (waits and entry.key is None))

    # --- what goes to the broker -----------------------------------------------------------------------------------

    def note(self, entry: Entry[Held]) -> None:
        """Have its attempts written down, or struck out where there are none."""
        first = self._by_name[entry.content.message.id][0]
        if entry is first:  # of two copies the first is what a record is about
            self._changed[entry.content.message.id] = entry

    def forget(self, entry: Entry[Held]) -> None:
        """It is finished."""
        self._acknowledge(entry)
        name = entry.content.message.id
        copies = self._by_name[name]
        copies.remove(entry)
        self._changed.pop(name, None)
        if not copies:
            del self._by_name[name]
            self._ended.append(name)

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
        kept = {name: one for name, one in attempts.items() if one != NONE}
        ended += [name for name in attempts if name not in kept]
        return kept, [name for name in ended if name not in kept]

    def not_written(self, changed: Iterable[str], ended: Sequence[str]) -> None:
        """Have these told again: the ledger does not have them yet."""
        for name in changed:
            if name in self._by_name:
                self._changed.setdefault(name, self._by_name[name][0])
        self._ended += ended

    @property
    def owes_ledger(self) -> bool:
        """Whether there is something that the ledger does not have yet."""
        return bool(self._changed or self._ended)

    @property
    def owes(self) -> bool:
        """Whether more may come that a member had which died."""
        return self.suspicious and not self.caught_up

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

    def is_old(self, before: float) -> bool:
        """Whether anything unfinished came before that."""
        return any(entry.content.since < before for entry in self.entries())

    def is_renewing(self, before: float) -> bool:
        """Whether something that came before that has not come again."""
        return any(
            entry.content.tag == ON_ITS_WAY and entry.content.since < before
            for entries in self._renewing.values()
            for entry in entries
        )

    def renew(self) -> None:
        """The channel is closed on purpose, and a new one opened; all that is finished is acknowledged.

        All that is unfinished comes again on the new one, in order and with new tags; meanwhile its work goes on.
        """
        self._watermark, self._renewing = Watermark(), {}
        for entry in sorted(self.entries()):
            entry.content.tag = ON_ITS_WAY
            self._renewing.setdefault(entry.content.message.id, []).append(entry)

    def _attempts(self, entry: Entry[Held]) -> Attempts:
        return Attempts(
            failures=entry.failures,
            crashes=entry.crashes,
            begun=entry.begun,
            apart=entry.apart,
            due=entry.due + self._wall_ahead if entry.due else 0.0,
            redelivered=entry.redelivered,
        )
