"""Lanes: a fixed set of queues; a key always goes to the same one, so its messages run one after another (C3).

Pure state, nothing here awaits: the member's tasks ask for the next delivery and run it.  While a key waits for its
retry, what this member still holds of the key is given back, because the broker will hand it out again behind the
retried one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from reliamq.spi import Delivery

__all__ = ["Lane", "Lanes"]


class _Mark:
    """Of a key: how many of its messages are on their way back, and from which receive on all is in order again."""

    __slots__ = ("pending", "until")

    def __init__(self) -> None:
        self.pending = self.until = 0


class Lane:
    """One queue of deliveries, worked off by one task."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Delivery, int]] = deque()
        self._running: bytes | None = None
        self._since = 0.0
        self._marks: dict[bytes, _Mark] = {}

    def starts(self, delivery: Delivery, now: float) -> None:
        """The lane's task works on ``delivery`` from ``now`` on."""
        self._running, self._since = delivery.message.key, now

    def ends(self) -> None:
        """It has finished that."""
        self._running = None

    def take_behind_stuck(self, *, before: float) -> list[Delivery]:
        """If its attempt runs since ``before`` or longer: take out all that its key has queued."""
        if self._running is None or self._since > before:
            return []
        taken = [delivery for delivery, _ in self.queue if delivery.message.key == self._running]
        if taken:
            self.queue = deque(each for each in self.queue if each[0].message.key != self._running)
        return taken

    def hold(self, key: bytes) -> None:
        """A message of the key goes back to the broker: nothing of the key may run from what was received so far.

        A :meth:`lift` must follow for each.
        """
        mark = self._marks.get(key)
        if mark is None:
            mark = self._marks[key] = _Mark()
        mark.pending += 1

    def lift(self, key: bytes, generation: int) -> None:
        """The broker has it back.  When it has all: only what was received up to ``generation`` may still be stale."""
        mark = self._marks.get(key)
        if mark is not None:
            mark.pending -= 1
            mark.until = generation

    def refuses(self, delivery: Delivery, generation: int) -> bool:
        """Whether the delivery, which came with the receive numbered ``generation``, may be stale and must go back."""
        mark = self._marks.get(delivery.message.key) if delivery.message.key is not None else None
        return mark is not None and (mark.pending > 0 or generation <= mark.until)

    def admits(self, delivery: Delivery, generation: int) -> bool:
        """Whether it may run now; if so all that was received before it is dealt with, and its key is in order."""
        if self.refuses(delivery, generation):
            return False
        if delivery.message.key is not None:
            self._marks.pop(delivery.message.key, None)
        return True

    def forget(self, generation: int) -> None:
        """Drop marks that nothing from a receive after ``generation`` can need; keeps the memory of them bounded."""
        stale = [key for key, mark in self._marks.items() if mark.pending <= 0 and mark.until < generation]
        for key in stale:
            del self._marks[key]


class Lanes:
    """All lanes of a member.  count: how many deliveries run at once."""

    def __init__(self, count: int) -> None:
        self.lanes = tuple(Lane() for _ in range(count))
        self._next = 0

    def lane_of(self, delivery: Delivery) -> Lane:
        """The lane of the delivery's key; without a key the shortest of two, taken in turn."""
        key = delivery.message.key
        if key is not None:
            return self.lanes[hash(key) % len(self.lanes)]
        self._next = (self._next + 1) % len(self.lanes)
        one, other = self.lanes[self._next], self.lanes[self._next - 1]
        return one if len(one.queue) <= len(other.queue) else other

    def queued(self) -> Iterable[Delivery]:
        """What waits in all lanes, not started."""
        return [delivery for lane in self.lanes for delivery, _ in lane.queue]

    def clear(self) -> list[Delivery]:
        """Take out all that has not started."""
        left = list(self.queued())
        for lane in self.lanes:
            lane.queue.clear()
        return left
