"""The retry policy: how often, how soon, and who waits.

Pure arithmetic on a number of failures; the delay it gives is kept by the broker, so it survives crashes (C6).  Which
exceptions deserve another attempt is part of it, because only the user knows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf

from reliamq.spi.arguments import check_time, check_whole_number, need

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
    Raises ConfigurationError naming the field that is wrong.
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
        check_whole_number("Backoff: attempts", self.attempts, least=1)
        check_time("Backoff: first", self.first, may_be_zero=True)
        check_time("Backoff: ceiling", self.ceiling, may_be_zero=True)
        check_time("Backoff: keep_order_up_to", self.keep_order_up_to, may_be_zero=True)
        need(self.ceiling >= self.first, "Backoff: ceiling", f"at least first={self.first}", self.ceiling)
        need(_is_number(self.factor) and 1 <= self.factor < inf, "Backoff: factor", "a number from 1 on", self.factor)
        need(_is_number(self.jitter) and 0 <= self.jitter <= 1, "Backoff: jitter", "a number from 0 to 1", self.jitter)
        self._check_exceptions()

    def _check_exceptions(self) -> None:
        single = f"({self.never.__name__},)" if isinstance(self.never, type) else "(ValueError,)"
        wanted = f"a tuple of exception classes, such as {single}"
        fine = isinstance(self.never, tuple) and all(map(_is_exception, self.never))
        need(fine, "Backoff: never", wanted, self.never)
        need(isinstance(self.on, Mapping), "Backoff: on", "a mapping of exception classes to Backoff", self.on)
        for kind, policy in self.on.items():
            need(_is_exception(kind), "Backoff: a key of on", "an exception class", kind)
            need(isinstance(policy, Backoff), f"Backoff: on {kind.__name__}", "a Backoff", policy)

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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)
