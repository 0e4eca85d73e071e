"""Whether what a topic's groups have still to handle is there, and will be until they come to it.

Pure functions: committed offsets are compared with where the logs begin and end, and the oldest unread record's age
with the topic's retention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from reliamq.spi import Finding, Severity
from reliamq_kafka.audit.commands import Commands
from reliamq_kafka.wire.log_reader import Bounds

__all__ = ["GroupView", "group_findings", "oldest_unread"]

SOON = timedelta(days=1)
"""Time in which somebody can act; with a shorter retention, half of that."""


@dataclass(frozen=True, slots=True)
class GroupView:
    """One group on one topic, as the cluster sees it.

    committed: by partition; what has none is not there.  bounds: of the partitions that have a leader.
    written_at: when the oldest unread record was written, by partition; None: there is none, only what no program sees.
    """

    topic: str
    group: str
    partitions: frozenset[int]
    committed: Mapping[int, int]
    bounds: Mapping[int, Bounds]
    written_at: Mapping[int, datetime | None] = field(default_factory=dict)

    @property
    def unread(self) -> dict[int, int]:
        """How many records are there to be read, by partition, where there are any."""
        counts = {number: self.bounds[number].end - first for number, first in oldest_unread(self).items()}
        nothing = {number for number, written in self.written_at.items() if written is None}
        return {number: count for number, count in counts.items() if count > 0 and number not in nothing}


def oldest_unread(view: GroupView) -> dict[int, int]:
    """The offset at which the group goes on, by partition, where it has an offset and the log a leader."""
    return {
        number: max(offset, view.bounds[number].start)
        for number, offset in view.committed.items()
        if number in view.bounds
    }


def group_findings(
    view: GroupView, *, retention: timedelta | None, has_size_limit: bool, now: datetime, commands: Commands
) -> Iterator[Finding]:
    """retention: the topic's; None: records are kept."""
    yield from _undeclared(view)
    yield from _removed(view, commands)
    yield from _cut_off(view, commands)
    if retention is not None:
        yield from _expiring(view, retention, now, commands)
    if has_size_limit and view.unread:
        count = sum(view.unread.values())
        why = f"Kafka removes records by size: whether {count} unread messages are next cannot be seen from outside."
        fix = commands.set_on_topic(view.topic, "retention.bytes=-1")
        yield _finding(view, Severity.UNSEEN, f"{count} unread, kept by size", "kept until read", why, fix)


def _finding(view: GroupView, severity: Severity, found: str, required: str, why: str, fix: str) -> Finding:
    return Finding(severity, f"topic {view.topic}", f"group {view.group}", found, required, why, fix)


def _undeclared(view: GroupView) -> Iterator[Finding]:
    without = sorted(view.partitions - view.committed.keys())
    if without:
        all_of_them = len(without) == len(view.partitions)
        found = "missing" if all_of_them else f"without a position in partition {', '.join(map(str, without))}"
        why = "Without a committed offset nobody knows where it stands, and publishing does not wait for it."
        fix = "Start the application once, or call 'await app.declare()'."
        yield _finding(view, Severity.LOSES, found, "declared", why, fix)


def _removed(view: GroupView, commands: Commands) -> Iterator[Finding]:
    gone = {
        number: lost
        for number, offset in view.committed.items()
        if number in view.bounds and (lost := view.bounds[number].start - offset) > 0
    }
    if gone:
        count = sum(gone.values())
        found = f"behind the start of the log in partition {', '.join(map(str, sorted(gone)))}"
        why = f"{count} messages were removed unread (by retention or by somebody); this group never gets them."
        fix = (
            f"Replay them from the outbox's sent rows; {commands.set_on_topic(view.topic, 'retention.ms=-1')}; then, "
            f"with its workers stopped, {commands.reset_to_earliest(view.topic, view.group)}"
        )
        yield _finding(view, Severity.LOSES, found, "within the log", why, fix)


def _cut_off(view: GroupView, commands: Commands) -> Iterator[Finding]:
    beyond = {
        number: missing
        for number, offset in view.committed.items()
        if number in view.bounds and (missing := offset - view.bounds[number].end) > 0
    }
    if beyond:
        count = sum(beyond.values())
        found = f"ahead of the end of the log in partition {', '.join(map(str, sorted(beyond)))}"
        why = (
            f"{count} messages that it handled are no longer there (an unclean election, or the topic was made anew), "
            "and as many new ones would be skipped."
        )
        fix = f"With its workers stopped: {commands.reset_to_earliest(view.topic, view.group)}"
        yield _finding(view, Severity.LOSES, found, "within the log", why, fix)


def _expiring(view: GroupView, retention: timedelta, now: datetime, commands: Commands) -> Iterator[Finding]:
    unread = view.unread
    if unread.keys() - view.written_at.keys():
        why = "The oldest unread record did not arrive in time, so its age is not known."
        fix = f"Ask again; {commands.set_on_topic(view.topic, 'retention.ms=-1')} makes it unimportant."
        yield _finding(view, Severity.UNSEEN, f"{sum(unread.values())} unread", "kept until read", why, fix)
    ends = {number: written + retention for number, written in view.written_at.items() if written and number in unread}
    late = {number: end for number, end in ends.items() if end - now < retention / 2}
    if not late:
        return
    count, first = sum(unread[number] for number in late), min(late.values())
    left = first - now
    when = "from now on" if left <= timedelta(0) else f"from {first:%Y-%m-%d %H:%M:%S} UTC on"
    severity = Severity.LOSES if left < min(SOON, retention / 2) else Severity.RISKS
    found = f"behind by {count} messages, the oldest of which expires {when}"
    why = f"After {retention} Kafka removes them, and this group has not handled them."
    fix = f"{commands.set_on_topic(view.topic, 'retention.ms=-1')}; then let the group catch up."
    yield _finding(view, severity, found, "kept until read", why, fix)
