"""What a postponed record says of itself, and where it waits next.  Nothing here awaits.

A delay is cut into waits of powers of two of seconds, the longest first, and each length has a partition of its own:
there all wait equally long, so the first is due first, and a long delay never holds up a short one.  A delay is rounded
up to whole seconds.  Equal delays go the same way, so they stay in order, unless one is later than a minute: then what
it is late is taken off its next waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from reliamq_kafka.wire.progress import Attempts
from reliamq_kafka.wire.records import ATTRIBUTE, OURS, Headers, Record

__all__ = ["PARTITIONS", "Delayed", "attempts_of", "due_at", "first_wait", "may_return", "original", "returning"]

PARTITIONS = 20
"""Waits of 2⁰ to 2¹⁹ seconds, which are six days; a longer delay goes round again."""
LATE_SECONDS = 60
TARGET, GROUP, LEFT = OURS + "target", OURS + "group", OURS + "left"
FAILURES, CRASHES = OURS + "failures", OURS + "crashes"
FACTS = frozenset((TARGET, GROUP, LEFT, FAILURES, CRASHES))
ONLY_GROUP = ATTRIBUTE + "onlygroup"


@dataclass(frozen=True, slots=True)
class Delayed:
    """For whom a record waits.

    topic, group: to which topic it goes back, for which of its groups.
    failures, crashes: its attempts so far.
    left: whole seconds that it has to wait yet; on a record, after the wait of the partition that it is in.
    """

    topic: str
    group: str
    failures: int
    crashes: int
    left: int

    def into(self, partitions: int) -> tuple[int, Delayed]:
        """The partition for its next wait, and what is left after that."""
        number = min(max(1, self.left).bit_length(), partitions, PARTITIONS) - 1
        return number, replace(self, left=max(0, self.left - (1 << number)))

    def late(self, seconds: float) -> Delayed:
        """The same, so late out of its last wait.  Little is not made up for: it would overtake its equals."""
        return self if seconds < LATE_SECONDS else replace(self, left=max(0, self.left - int(seconds)))

    def headers(self) -> Headers:
        """What its record says beside its own headers."""
        texts = {TARGET: self.topic, LEFT: str(self.left), **_texts(self.group, self.failures, self.crashes)}
        return [(name, text.encode()) for name, text in texts.items()]

    @classmethod
    def read(cls, headers: Sequence[tuple[str, bytes]]) -> Delayed:
        """What :meth:`headers` wrote.  Raises KeyError, ValueError for a record that nobody of ours postponed."""
        facts = _facts(headers)
        return cls(facts[TARGET], facts[GROUP], int(facts[FAILURES]), int(facts[CRASHES]), int(facts[LEFT]))


def first_wait(topic: str, group: str, attempts: Attempts, delay: timedelta) -> Delayed:
    """A record that begins to wait; at least a second."""
    seconds = -(-delay // timedelta(seconds=1))
    return Delayed(topic, group, attempts.failures, attempts.crashes, max(1, seconds))


def due_at(partition: int, timestamp: int) -> float:
    """When the wait of a record is over, in seconds of the clock that gave its timestamp, which is in milliseconds."""
    return timestamp / 1000 + (1 << partition)


def original(headers: Sequence[tuple[str, bytes]]) -> Headers:
    """The headers without what an earlier wait has added."""
    return [(name, data) for name, data in headers if name not in FACTS]


def returning(headers: Sequence[tuple[str, bytes]], delayed: Delayed) -> Headers:
    """The headers with which it comes back to its topic: as they were, for its group alone, with its attempts."""
    address = ONLY_GROUP, delayed.group.encode()
    own = original(headers)
    if address not in own:
        own = [*((name, data) for name, data in own if name != ONLY_GROUP), address]
    texts = _texts(delayed.group, delayed.failures, delayed.crashes)
    return own + [(name, text.encode()) for name, text in texts.items()]  # last, where may_return looks


def group_of(headers: Sequence[tuple[str, bytes]]) -> str | None:
    """For which group alone a record came back from its wait; None for any other record."""
    return next((data.decode(errors="replace") for name, data in headers if name == GROUP and data is not None), None)


def may_return(record: Record) -> bool:
    """Whether it can have come back from a wait: a quick look, made at every record.  Our facts come last."""
    return bool(record.headers) and record.headers[-1][0].startswith(OURS)


def attempts_of(headers: Sequence[tuple[str, bytes]], group: str) -> Attempts:
    """The attempts that a record brings back to ``group`` from its wait; none for any other record (C4)."""
    if group_of(headers) != group:
        return Attempts()
    try:
        facts = _facts(headers)
        return Attempts(failures=int(facts[FAILURES]), crashes=int(facts[CRASHES]))
    except (KeyError, ValueError):  # somebody else's header of that name
        return Attempts()


def _texts(group: str, failures: int, crashes: int) -> dict[str, str]:
    return {GROUP: group, FAILURES: str(failures), CRASHES: str(crashes)}


def _facts(headers: Sequence[tuple[str, bytes]]) -> dict[str, str]:
    return {name: data.decode() for name, data in headers if name in FACTS and data is not None}
