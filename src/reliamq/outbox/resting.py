"""Topics that take nothing for now rest, so that what waits for them does not stand before what others would take.

A claim begins with the oldest rows.  When a topic cannot be stored to (no leader, no majority) and its rows are more
than a claim holds, every claim would be theirs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

__all__ = ["Resting"]

FIRST_REST_SECONDS = 0.1
LONGEST_REST_SECONDS = 5.0


class Resting:
    """State of one relay.  A topic rests twice as long each time that it took nothing, until it takes something."""

    def __init__(self) -> None:
        self._rests: dict[str, tuple[float, float]] = {}  # until when, and how long that was

    def topics(self) -> Sequence[str]:
        """Those that rest now."""
        now = time.monotonic()
        return [topic for topic, (until, _) in self._rests.items() if until > now]

    def seconds(self) -> float:
        """Until the first of them is to be tried again; 0 if none rests."""
        now = time.monotonic()
        return min((until - now for until, _ in self._rests.values() if until > now), default=0.0)

    def judge(self, tried: Collection[str], took: Collection[str]) -> None:
        """tried: topics of a claim.  took: those of them that took, or judged, at least one message."""
        for topic in took:
            self._rests.pop(topic, None)
        for topic in set(tried).difference(took):
            before = self._rests.get(topic)
            rest = FIRST_REST_SECONDS if before is None else min(2 * before[1], LONGEST_REST_SECONDS)
            self._rests[topic] = time.monotonic() + rest, rest
