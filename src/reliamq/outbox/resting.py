"""Topics that take nothing for now rest, so that what waits for them does not stand before what others would take.

A claim begins with the oldest rows.  When a topic cannot be stored to (no leader, no majority) and its rows are more
than a claim holds, every claim would be theirs.  To look past them costs the database as much as there are of them, so
that is not done all the time: with a broker that is down there is nothing else to find.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

__all__ = ["Resting"]

FIRST_REST_SECONDS = 0.1
LONGEST_REST_SECONDS = 5.0
POLL_SECONDS, LEAST_SECONDS = 1.0, 0.01
IDLE_AFTER_NOTHING, IDLE_AFTER_ROWS = 19, 1
"""How many times as long as it took a relay does not look past resting topics again: a twentieth of its time for looks
that find nothing, half of it for others.
"""


class Resting:
    """State of one relay.  A topic rests twice as long each time that it took nothing, until it takes something."""

    def __init__(self) -> None:
        self._rests: dict[str, tuple[float, float]] = {}  # until when, and how long that was
        self._look_at = 0.0

    def topics(self) -> Sequence[str]:
        """Those that rest now."""
        return list(self._left())

    def seconds(self) -> float:
        """Until it is time to try the first of them again, or to look past them; 0 if none rests."""
        left = self._left()
        return min(*left.values(), max(LEAST_SECONDS, self._look_at - time.monotonic())) if left else 0.0

    def _left(self) -> dict[str, float]:
        """Seconds that each topic still rests."""
        now = time.monotonic()
        return {topic: until - now for topic, (until, _) in self._rests.items() if until > now}

    def may_look(self) -> bool:
        """Whether it is time for a claim: there is nothing to look past, or it was not done for long enough."""
        return time.monotonic() >= self._look_at or not self.topics()

    def looked(self, seconds: float, *, found: bool) -> None:
        """A claim has looked past them.  seconds: how long it took."""
        idle = IDLE_AFTER_ROWS * seconds if found else max(POLL_SECONDS, IDLE_AFTER_NOTHING * seconds)
        self._look_at = time.monotonic() + idle

    def judge(self, tried: Collection[str], took: Collection[str]) -> None:
        """tried: topics of a claim.  took: those of them that took, or judged, at least one message."""
        for topic in took:
            self._rests.pop(topic, None)
        for topic in set(tried).difference(took):
            before = self._rests.get(topic)
            rest = FIRST_REST_SECONDS if before is None else min(2 * before[1], LONGEST_REST_SECONDS)
            self._rests[topic] = time.monotonic() + rest, rest
