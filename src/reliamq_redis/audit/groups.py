"""Whether what a group has still to handle is there, and whether somebody handles it: pure functions.

Nothing is removed before every group has finished it, so that being behind loses nothing.  What somebody else removed
is found by what Redis counts (``XINFO``): XDEL leaves the highest id that it took; after XTRIM it is known only that
the group must have had every one of the entries that were ever added and are no longer there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum, auto

from reliamq.spi import Severity
from reliamq_redis.audit.answers import EntryId, after, before, shown_id
from reliamq_redis.audit.commands import REPLAY, Commands
from reliamq_redis.audit.lanes import CONSUMER, GroupOnLane, LaneView, TopicView
from reliamq_redis.audit.rules import SHOWN, Fault
from reliamq_redis.wire.servers import Address

__all__ = ["STANDS_STILL_SECONDS", "Removed", "group_faults", "removed_unread"]

LONG_SECONDS = 60.0
"""A deployment may leave a group without members for less."""
STANDS_STILL_SECONDS = 86_400.0
"""Older than a topic keeps what is finished, and so much more: as workers judge it, too."""
NOTHING: EntryId = (0, 0)
OnLanes = Sequence[tuple[LaneView, GroupOnLane]]


class Removed(Enum):
    """What somebody removed that a group has not had."""

    NONE = auto()
    SOME = auto()
    PERHAPS = auto()
    """The group has had nothing yet: it may have been declared after it."""
    UNKNOWN = auto()


def removed_unread(lane: LaneView, group: str) -> Removed:
    """Whether entries are gone that the group has not had.  What is pending is not judged here."""
    groups = lane.groups or {}
    one = groups[group]
    if lane.generated <= one.delivered:
        return Removed.NONE  # nothing came after what it had
    if lane.added is None:
        return Removed.UNKNOWN
    if one.delivered == NOTHING:
        return _before_anything(lane, group)
    if lane.deleted > one.delivered:
        return Removed.SOME
    if (lane.first or after(lane.generated)) <= after(one.delivered):
        return Removed.NONE  # the stream goes back to where it is
    removed = lane.added - lane.length
    if one.read is None:
        return Removed.UNKNOWN if removed else Removed.NONE
    return Removed.SOME if removed > one.read else Removed.NONE


def _before_anything(lane: LaneView, group: str) -> Removed:
    """A group that is new on a topic gets what is kept; what others have finished is gone rightly."""
    if lane.added == lane.length:
        return Removed.NONE
    others = [one for name, one in (lane.groups or {}).items() if name != group and one.delivered != NOTHING]
    return Removed.NONE if others else Removed.PERHAPS


def group_faults(
    view: TopicView, group: str, *, retention_seconds: float, address: Address, commands: Commands
) -> Iterator[tuple[Fault, Sequence[str]]]:
    """Each with the streams that have it; none where it is of them all.  address: of a server, for commands."""
    lanes = [(lane, lane.groups[group]) for lane in view.lanes if lane.groups and group in lane.groups]
    yield from _removed_faults(lanes, group, address, commands)
    yield from _pending_faults(lanes, group, address, commands)
    yield from _late_faults(lanes)
    yield from _waiting_faults(view, lanes, group, retention_seconds)


# --- what is gone -----------------------------------------------------------------------------------------------------


VERDICTS = {
    Removed.SOME: (Severity.LOSES, "removed by somebody (XTRIM, XDEL)", "This group never gets them."),
    Removed.PERHAPS: (
        Severity.RISKS,
        "removed by somebody, or before the group was declared",
        "If it was there then, it never gets them; it has had nothing yet, so that this cannot be told apart.",
    ),
    Removed.UNKNOWN: (
        Severity.UNSEEN,
        "perhaps removed by somebody",
        "Redis does not count what this group has had (before 7.0, or until it has reached the stream's end).",
    ),
}


def _removed_faults(
    lanes: OnLanes, group: str, address: Address, commands: Commands
) -> Iterator[tuple[Fault, Sequence[str]]]:
    verdicts = {lane.stream: removed_unread(lane, group) for lane, _ in lanes}
    for verdict, (severity, found, why) in VERDICTS.items():
        those = [(lane, one) for lane, one in lanes if verdicts[lane.stream] is verdict]
        if not those:
            continue
        fix = "Let the group catch up and ask again; see that nobody uses XTRIM, XDEL or MAXLEN."
        if verdict is not Removed.UNKNOWN:
            accepting = _of_each(_accept(lane, group, one, address, commands) for lane, one in those)
            fix = f"See who does that, and {REPLAY}; then have the group go on without them: {accepting}"
        streams = [lane.stream for lane, _ in those]
        yield Fault(severity, "unread entries", found, "kept until handled", why, fix), streams


def _of_each(fixes: Iterable[str]) -> str:
    """The commands for some streams, and that the others are mended alike."""
    shown = list(fixes)
    more = ". And so for the others." if len(shown) > SHOWN else ""
    return "; ".join(shown[:SHOWN]) + more


def _accept(lane: LaneView, group: str, one: GroupOnLane, address: Address, commands: Commands) -> str:
    """Have the group begin behind what is gone at the start, and Redis forget what is gone behind that.  Nothing is
    passed over that is there.
    """
    position = max(one.delivered, before(lane.first or after(lane.generated)))
    move = ["XGROUP", "SETID", lane.stream, group, shown_id(position)]
    if lane.deleted <= position:
        return commands.on_key(address, *move, "ENTRIESREAD", str((lane.added or 0) - lane.length))
    forget = ["XSETID", lane.stream, shown_id(lane.generated), "MAXDELETEDID", shown_id(position)]
    return f"{commands.on_key(address, *forget)} && {commands.on_key(address, *move)}"


def _pending_faults(
    lanes: OnLanes, group: str, address: Address, commands: Commands
) -> Iterator[tuple[Fault, Sequence[str]]]:
    gone = [name for _, one in lanes for name in one.removed]
    if gone:
        why = "They were fetched and not finished; whoever has the lane next finds nothing in them."
        fix = f"See who does that, and {REPLAY}; workers that are started anew pass over them."
        found = f"removed by somebody ({len(gone)}, such as {gone[0]})"
        streams = [lane.stream for lane, one in lanes if one.removed]
        yield Fault(Severity.LOSES, "unfinished entries", found, "kept until handled", why, fix), streams
    yield from _foreign_faults([(lane, one) for lane, one in lanes if one.elsewhere], group, address, commands)


def _foreign_faults(
    lanes: OnLanes, group: str, address: Address, commands: Commands
) -> Iterator[tuple[Fault, Sequence[str]]]:
    """lanes: those of which others than workers have fetched something."""
    if not lanes:
        return
    streams = [lane.stream for lane, _ in lanes]
    names = sorted({name for _, one in lanes for name in one.elsewhere})
    count = sum(sum(one.elsewhere.values()) for _, one in lanes)
    why = "Who took them is no worker of reliamq's: nobody handles them, and nothing behind them is removed."
    claims = (commands.on_key(address, "XAUTOCLAIM", stream, group, CONSUMER, "60000", "0") for stream in streams)
    fix = f"{_of_each(claims)} (until it answers 0-0), and start the workers anew."
    found, required = f"{count} fetched by {', '.join(names)}", "fetched by workers alone"
    yield Fault(Severity.LOSES, "unfinished entries", found, required, why, fix), streams


def _late_faults(lanes: OnLanes) -> Iterator[tuple[Fault, Sequence[str]]]:
    odd = [(lane, one) for lane, one in lanes if one.away != one.kept]
    if odd:
        away, kept = sum(one.away for _, one in odd), sum(one.kept for _, one in odd)
        why = "A late retry comes back only if both its time and its message are there."
        fix, streams = f"See who removed keys, and {REPLAY}.", [lane.stream for lane, _ in odd]
        found = f"{away} by time, {kept} with their message"
        yield Fault(Severity.LOSES, "late retries", found, "as many of both", why, fix), streams


# --- what waits -------------------------------------------------------------------------------------------------------


def _waiting_faults(
    view: TopicView, lanes: OnLanes, group: str, retention_seconds: float
) -> Iterator[tuple[Fault, Sequence[str]]]:
    waiting = [(lane, one) for lane, one in lanes if one.oldest is not None or one.overdue]
    yield from _idle_faults(view, waiting, group)
    oldest = [one.oldest[0] for _, one in waiting if one.oldest is not None]
    age = (view.now - min(oldest, default=view.now)) / 1000
    if age > retention_seconds + STANDS_STILL_SECONDS:
        why = "Everything since is kept for it, until memory is full."
        fix = (
            "Let it catch up; one that nobody needs any more: XGROUP DESTROY on each stream, and SREM from the topic's "
            "groups."
        )
        found, required = f"{_period(age)} old", "finished within the topic's retention and a day"
        yield Fault(Severity.NOTE, "oldest unfinished entry", found, required, why, fix), []


def _idle_faults(view: TopicView, waiting: OnLanes, group: str) -> Iterator[tuple[Fault, Sequence[str]]]:
    """Nobody is there, or nobody has those lanes."""
    long_ago = view.now - int(LONG_SECONDS * 1000)
    if not view.members.get(group):
        since = min((_since(one, view.now) for _, one in waiting), default=view.now)
        if since < long_ago:
            found = f"none, and {_count(waiting)} for {_period((view.now - since) / 1000)}{_left(view, waiting)}"
            why = "Nobody handles them; nothing is lost, and nothing is removed."
            yield Fault(Severity.NOTE, "members", found, "at least one", why, "Start its workers."), []
        return
    idle = [
        lane.stream for lane, one in waiting if (one.held_until or 0) < long_ago and _since(one, view.now) < long_ago
    ]
    if idle:
        why = "Members are there, and none of them has these lanes."
        found, fix = "had by nobody while entries wait", "See the workers' logs."
        yield Fault(Severity.NOTE, "lanes", found, "had by members", why, fix), idle


def _since(one: GroupOnLane, now: int) -> int:
    """Since when something waits, wall-clock milliseconds."""
    return min(one.oldest[0] if one.oldest else now, one.due if one.overdue and one.due is not None else now)


def _count(waiting: OnLanes) -> str:
    unread = [one.behind for _, one in waiting]
    count = sum(one.pending + one.overdue + (one.behind or 0) for _, one in waiting)
    more = " or more" if None in unread else ""
    return f"one{more} waits" if count == 1 else f"{count}{more} wait"


def _left(view: TopicView, waiting: OnLanes) -> str:
    """When the last one was there that did not say goodbye."""
    ends = [one.held_until for _, one in waiting if one.held_until is not None]
    return f"; the last one was gone {_period((view.now - max(ends)) / 1000)} ago" if ends else ""


def _period(seconds: float) -> str:
    """``3 days``, ``5 hours``, ``2 minutes``, whole ones."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} seconds"
