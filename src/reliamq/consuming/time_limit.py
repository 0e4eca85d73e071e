"""How long an attempt may take.

A handler's timeout counts from the start of its effect to its end.  Waiting for a connection, a lease or a thread
before, and committing after, are not the handler's doing: they have a limit of their own, and running into it is no
attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

__all__ = ["AROUND_SECONDS", "TimeLimit"]

AROUND_SECONDS = 90.0
"""For what comes before an effect, and again for what comes after; longer than a pool lets anybody wait."""


class TimeLimit:
    """Stops the task that has entered ``timeout`` when a phase takes too long, or at once.

    Somebody must call :meth:`check` now and then: a look at all running attempts costs less than timers for each.
    in_effect: whether the handler's own function is running.
    """

    __slots__ = ("_clock", "_deadline", "_seconds", "in_effect", "timeout")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline = inf
        self._seconds = inf
        self.in_effect = False
        self.timeout = asyncio.timeout(None)

    def allow(self, seconds: float | None) -> None:
        """From now on: ``seconds`` for the effect, None for one without a limit."""
        self._seconds = inf if seconds is None else seconds
        self._deadline = self._clock() + AROUND_SECONDS

    def effect_starts(self) -> None:
        """The handler's function is called now."""
        self.in_effect = True
        self._deadline = self._clock() + self._seconds

    def effect_ends(self) -> None:
        """It returned or raised."""
        self.in_effect = False
        self._deadline = self._clock() + AROUND_SECONDS

    def check(self, now: float) -> None:
        """Stop the attempt if its time is over.  Call it while the attempt runs only."""
        if now >= self._deadline:
            self.stop_now()

    def stop_now(self) -> None:
        """Stop the attempt: its time is over, or its delivery is somebody else's."""
        if not self.timeout.expired():
            self.timeout.reschedule(self._clock())
