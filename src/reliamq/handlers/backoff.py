"""The retry policy: how often, how soon, and who waits.

Pure arithmetic on a number of failures; the delay it gives is kept by the broker, so it survives crashes (C6).  Which
exceptions deserve another attempt is part of it, because only the user knows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from reliamq.spi import ConfigurationError

__all__ = ["Backoff"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter.

    attempts: starts of the handler before the message becomes a dead letter.  At least 1.
    first: delay after the first failure.  factor: each further delay is that many times longer, up to ``ceiling``.
    jitter: the delay is drawn evenly from [1 - jitter, 1] of itself, so that failures which came together do not return
        together.  0 to 1.
    keep_order_up_to: for keyed topics.  While a message waits for a retry, a delay up to this keeps its key waiting
        (*keep order*); a longer one lets the key's others go first (*give way*).  Order and waiting cannot both be had
        (C6): ``timedelta.max`` always keeps the order, ``timedelta(0)`` never.
    never: exceptions for which a further attempt is pointless: dead-lettered at once.
    on: another policy for an exception class; the most specific class wins.  Only its delays and ``attempts`` count.
    """

    attempts: int = 8
    first: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    ceiling: timedelta = timedelta(minutes=10)
    jitter: float = 0.2
    keep_order_up_to: timedelta = timedelta(seconds=30)
    never: tuple[type[Exception], ...] = ()
    on: Mapping[type[Exception], Backoff] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = {
            "attempts": self.attempts >= 1,
            "first": self.first >= timedelta(0),
            "factor": self.factor >= 1,
            "ceiling": self.ceiling >= self.first,
            "jitter": 0 <= self.jitter <= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigurationError(f"Backoff: {name}={getattr(self, name)!r} is out of range")

    def policy_for(self, error: Exception) -> Backoff:
        """The policy that counts for ``error``."""
        for kind in type(error).__mro__:
            if kind in self.on:
                return self.on[kind]
        return self

    def delay(self, failures: int) -> timedelta:
        """How long to wait after the ``failures``-th failure (from 1), jitter included."""
        seconds = self._seconds(failures)
        return timedelta(seconds=seconds * random.uniform(1 - self.jitter, 1))  # noqa: S311  # spreads load, no secret

    def keeps_order(self, delay: timedelta) -> bool:
        """Whether a key waits that long for its message."""
        return delay <= self.keep_order_up_to

    def longest(self) -> timedelta:
        """The longest time from the first attempt to the last: what an idempotency window must exceed (I5)."""
        own = timedelta(seconds=sum(self._seconds(failures) for failures in range(1, self.attempts)))
        return max((own, *(policy.longest() for policy in self.on.values())))

    def _seconds(self, failures: int) -> float:
        ceiling = self.ceiling.total_seconds()
        try:
            return min(self.first.total_seconds() * self.factor ** (failures - 1), ceiling)
        except OverflowError:  # a float ends at about 2.0 ** 1024; every ceiling is below
            return ceiling if self.first else 0.0
