"""Lanes: a fixed number of tasks that work off keys; a key is in one lane at a time, so its messages run one after
another, and whichever lane is free takes the next key that is ready: a slow message holds up its own key alone (C3).

Pure state, nothing here awaits: the member's tasks ask for the next delivery and run it.  While a key waits for its
retry, what this member still holds of the key is given back, because the broker will hand it out again behind the
retried one.
"""

from __future__ import annotations

from collections import deque

from reliamq.spi import Delivery

__all__ = ["Lanes"]

Received = tuple[Delivery, int]
"""A delivery and the number of the receive that it came with."""


class _Mark:
    """Of a key: how many of its messages are on their way back, and from which receive on all is in order again."""

    __slots__ = ("pending", "until")

    def __init__(self) -> None:
        self.pending = self.until = 0


class _Line:
    """The deliveries of one key, in order.  since: when the one that runs was started; None while none runs."""

    __slots__ = ("queue", "since")

    def __init__(self) -> None:
        self.queue: deque[Received] = deque()
        self.since: float | None = None


class Lanes:
    """What a member was given and has not concluded, key by key."""

    def __init__(self) -> None:
        self._ready: deque[_Line | Received] = deque()
        self._lines: dict[bytes, _Line] = {}
        self._marks: dict[bytes, _Mark] = {}

    # --- what comes and what runs ----------------------------------------------------------------------------------

    def add(self, delivery: Delivery, generation: int) -> bool:
        """Queue a delivery of the receive numbered ``generation``; whether a lane that sleeps has something to do."""
        key = delivery.message.key
        if key is None:
            self._ready.append((delivery, generation))
            return True
        line = self._lines.get(key)
        if line is not None:
            line.queue.append((delivery, generation))
            return False
        line = self._lines[key] = _Line()
        line.queue.append((delivery, generation))
        self._ready.append(line)
        return True

    def take(self, now: float) -> Received | None:
        """The next delivery, of a key of which none runs; :meth:`ends` must follow.  None: nothing is ready.

        now: since when a lane works on it.
        """
        if not self._ready:
            return None
        entry = self._ready.popleft()
        if isinstance(entry, tuple):
            return entry
        entry.since = now
        return entry.queue.popleft()

    def ends(self, delivery: Delivery) -> None:
        """The lane is done with a delivery that it took: the next of its key may be taken."""
        key = delivery.message.key
        if key is None:
            return
        line = self._lines[key]
        line.since = None
        if line.queue:
            self._ready.append(line)
        else:
            del self._lines[key]

    def take_behind_stuck(self, *, before: float) -> list[Delivery]:
        """Take out all that is queued behind deliveries which run since ``before`` or longer."""
        taken: list[Delivery] = []
        for line in self._lines.values():
            if line.since is not None and line.since <= before:
                taken.extend(delivery for delivery, _ in line.queue)
                line.queue.clear()
        return taken

    def clear(self) -> list[Delivery]:
        """Take out all that has not started."""
        left = [entry[0] for entry in self._ready if isinstance(entry, tuple)]
        self._ready.clear()
        for line in self._lines.values():
            left.extend(delivery for delivery, _ in line.queue)
            line.queue.clear()
        self._lines = {key: line for key, line in self._lines.items() if line.since is not None}
        return left

    # --- what goes back --------------------------------------------------------------------------------------------

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
        if not self._marks or delivery.message.key is None:
            return False
        mark = self._marks.get(delivery.message.key)
        return mark is not None and (mark.pending > 0 or generation <= mark.until)

    def admits(self, delivery: Delivery, generation: int) -> bool:
        """Whether it may run now; if so all that was received before it is dealt with, and its key is in order."""
        if self.refuses(delivery, generation):
            return False
        if self._marks and delivery.message.key is not None:
            self._marks.pop(delivery.message.key, None)
        return True

    def forget(self, generation: int) -> None:
        """Drop marks that nothing from a receive after ``generation`` can need; keeps the memory of them bounded."""
        stale = [
            key
            for key, mark in self._marks.items()
            if mark.pending <= 0 and mark.until < generation and key not in self._lines
        ]
        for key in stale:
            del self._marks[key]
