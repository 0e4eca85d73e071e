"""How long to pause before sending again what found no broker.

Exponential with jitter, so that many publishers do not return at the same moment.  What is sent again, and until when,
is the publisher's business.
"""

from __future__ import annotations

import random

__all__ = ["Pause"]


class Pause:
    """Grows with each failure in a row, from ``first`` to ``ceiling`` seconds."""

    def __init__(self, *, first: float = 0.02, ceiling: float = 2.0) -> None:
        self._first, self._ceiling = first, ceiling
        self._next = first

    def longer(self) -> float:
        """Seconds to pause now; the next pause is twice as long."""
        seconds = self._next * random.uniform(0.5, 1.0)  # noqa: S311  # spreads load, no secret
        self._next = min(self._next * 2, self._ceiling)
        return seconds

    def reset(self) -> None:
        """Something went through."""
        self._next = self._first
