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


class Lane:
    """One queue of deliveries, worked off by one task."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Delivery, int]] = deque()
        self._running: bytes | None = None
        self._since = 0.0
        self._waiting_keys: dict[bytes, int | None] = {}

    def starts(self, delivery: Delivery, now: float) -> None:
        """The lane's task works on ``delivery`` from ``now`` on."""
        self._running, self._since = delivery.message.key, now

    def ends(self) -> None:
        """It has finished that."""
        self._running = None

    def take_behind_stuck(self, share: int, *, before: float) -> list[Delivery]:
        """If its attempt runs since ``before`` or longer: take out what its key has queued beyond ``share``."""
        if self._running is None or self._since > before or len(self.queue) <= share:
            return []
        left: deque[tuple[Delivery, int]] = deque()
        taken: list[Delivery] = []
        for delivery, generation in self.queue:
            if delivery.message.key != self._running:
                left.append((delivery, generation))
            elif share > 0:
                share -= 1
                left.append((delivery, generation))
            else:
                taken.append(delivery)
        self.queue = left
        return taken

    def hold(self, key: bytes) -> None:
        """The key's message waits for its retry: nothing of it may run from what was received so far."""
        self._waiting_keys[key] = None

    def lift(self, key: bytes, generation: int) -> None:
        """The broker knows of the retry now: only what was received up to ``generation`` may still be stale."""
        if key in self._waiting_keys:
            self._waiting_keys[key] = generation

    def admits(self, delivery: Delivery, generation: int) -> bool:
        """Whether the delivery, which came with the receive numbered ``generation``, may run."""
        key = delivery.message.key
        if key is None or key not in self._waiting_keys:
            return True
        until = self._waiting_keys[key]
        if until is None or generation <= until:
            return False
        del self._waiting_keys[key]
        return True

    def forget(self, generation: int) -> None:
        """Drop marks that nothing from a receive after ``generation`` can need; keeps the memory of them bounded."""
        stale = [key for key, until in self._waiting_keys.items() if until is not None and until < generation]
        for key in stale:
            del self._waiting_keys[key]


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

    def take_behind_stuck(self, share: int, *, before: float) -> list[Delivery]:
        """The same of every lane."""
        return [delivery for lane in self.lanes for delivery in lane.take_behind_stuck(share, before=before)]

    def clear(self) -> list[Delivery]:
        """Take out all that has not started."""
        left = list(self.queued())
        for lane in self.lanes:
            lane.queue.clear()
        return left
