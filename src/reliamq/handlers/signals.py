"""What a handler raises on purpose to say how its delivery ends.

Signals are not errors and do not inherit from ``ReliamqError``, so that a user's ``except ReliamqError`` cannot eat
them.  What they cause is decided in ``reliamq.consuming``.
"""

from __future__ import annotations

from datetime import timedelta

from reliamq.spi.arguments import check_time

__all__ = ["DeadLetter", "RetryAfter"]


class RetryAfter(Exception):
    """Try this message again after ``delay``.  Counts as a failed attempt, so that nothing loops for ever (C4).

    delay: how long to wait at least.  reason: one line for people.
    keep_order: whether the key waits for this message; None: as the retry policy says for a delay of that length.
    Raises ConfigurationError for a delay that is none, which is a failed attempt like any other.
    """

    def __init__(self, delay: timedelta, *, reason: str = "", keep_order: bool | None = None) -> None:
        check_time("RetryAfter: delay", delay, may_be_zero=True)
        self.delay, self.reason, self.keep_order = delay, reason, keep_order
        super().__init__(reason or f"asked to be tried again after {delay}")


class DeadLetter(Exception):
    """Give this message up at once: no further attempt can succeed (C5).  reason: one line for people."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)
