"""A topic's lanes, its groups on each, and their keys, as they are on the servers: read and not judged.

What is read of one lane is read in this order: the stream, its groups, what they have not finished.  Workers go on
meanwhile, and only ever forward, so that what was removed by then is never more than what was finished later.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reliamq_redis.audit.answers import EntryId, after, entry_id, pairs_of, shown_id
from reliamq_redis.audit.questions import Questions
from reliamq_redis.catalog.names import LaneKeys, TopicKeys, stream_of

__all__ = ["CONSUMER", "GroupOnLane", "LaneView", "OddKey", "TopicView", "look_at_key", "read_topic"]

AT_ONCE = 8
"""Lanes that are read side by side."""
PENDING_CHECKED = 100
CONSUMER = "lane"
"""As ``fetch.lua`` calls it."""
GONE = -2
FOR_EVER = -1


@dataclass(frozen=True, slots=True)
class OddKey:
    """A key of reliamq's that is otherwise than reliamq makes it.

    kind: its type, where that is another; required: that it should have.  expires: in milliseconds; None: never.
    """

    key: str
    kind: str
    required: str
    expires: int | None


@dataclass(frozen=True, slots=True)
class GroupOnLane:
    """delivered: the entry that it had last.  read: how many it had, where Redis knows (7.0).

    pending: fetched and not finished; oldest: the first of these, or of what it has not had; None: it has all.
    removed: of the pending, some that are not in the stream any more.
    elsewhere: consumers of nobody's that have some of them, and how many.
    behind: entries that it has not had, where Redis knows.
    held_until: when the lane's lease ends, wall-clock milliseconds; None: nobody has it.
    overdue: late retries that should have come back; due: when the first of all should, wall-clock milliseconds.
    away, kept: how many late retries there are, and how many of them have their message.
    """

    delivered: EntryId
    read: int | None = None
    pending: int = 0
    oldest: EntryId | None = None
    removed: Sequence[str] = ()
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    behind: int | None = 0
    held_until: int | None = None
    overdue: int = 0
    due: int | None = None
    away: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True)
class LaneView:
    """One stream.

    exists: it is there, and is a stream.  groups: None where they were not told.
    first: its first entry; None: it is empty.  generated: the last id that was ever given.
    deleted: the highest that XDEL took.  added: how many ever were, where Redis knows (7.0).
    """

    stream: str
    exists: bool
    length: int = 0
    first: EntryId | None = None
    generated: EntryId = (0, 0)
    deleted: EntryId = (0, 0)
    added: int | None = None
    groups: Mapping[str, GroupOnLane] | None = None
    odd: Sequence[OddKey] = ()


@dataclass(frozen=True, slots=True)
class TopicView:
    """declared: names of groups; None where it was not told.  members: how many are there, by group.

    now: the server's, wall-clock milliseconds.
    """

    lanes: Sequence[LaneView]
    declared: frozenset[str] | None
    members: Mapping[str, int]
    odd: Sequence[OddKey]
    now: int

    @property
    def groups(self) -> list[str]:
        """Declared, or on a stream."""
        return sorted((self.declared or frozenset()).union(*(lane.groups or () for lane in self.lanes)))


async def read_topic(questions: Questions, topic: str, lanes: int, wanted: Collection[str]) -> TopicView:
    """wanted: groups that are asked for.  Raises the client's errors."""
    keys = TopicKeys(topic)
    odd = await look_at_key(questions, keys.groups, "set")
    names: Any = None if odd and odd.kind != "set" else await questions.of_key(keys.groups, "SMEMBERS", keys.groups)
    declared = None if names is None else frozenset(name.decode() for name in names)
    seconds, _ = await questions.of_key(keys.facts, "TIME") or (int(time.time()), 0)
    found = await _read_lanes(questions, topic, lanes, {*wanted, *(declared or ())}, seconds * 1000)
    groups = {*wanted, *(declared or ())}.union(*(lane.groups or () for lane in found))
    odd_members = {group: await look_at_key(questions, keys.members(group), "zset") for group in groups}
    members = {
        group: await _members(questions, keys.members(group), seconds * 1000)
        for group in groups
        if (odd_one := odd_members[group]) is None or odd_one.kind == "zset"
    }
    all_odd = [one for one in (odd, *odd_members.values()) if one is not None]
    return TopicView(found, declared, members, all_odd, seconds * 1000)


async def _read_lanes(
    questions: Questions, topic: str, lanes: int, groups: Collection[str], now: int
) -> Sequence[LaneView]:
    limit = asyncio.Semaphore(AT_ONCE)

    async def read(number: int) -> LaneView:
        async with limit:
            return await _read_lane(questions, topic, number, groups, now)

    # All are waited for, also when one fails: nothing goes on behind the caller's back
    results = await asyncio.gather(*[read(number) for number in range(lanes)], return_exceptions=True)
    return [_read_or_raised(result) for result in results]


def _read_or_raised(result: LaneView | BaseException) -> LaneView:
    if isinstance(result, BaseException):
        raise result
    return result


async def _members(questions: Questions, key: str, now: int) -> int:
    return int(await questions.of_key(key, "ZCOUNT", key, now, "+inf") or 0)


async def look_at_key(questions: Questions, key: str, required: str) -> OddKey | None:
    """The key, if something is odd about it; a key that is not there is not odd."""
    left: Any = await questions.of_key(key, "PTTL", key)
    if left == GONE:
        return None
    kind: Any = await questions.of_key(key, "TYPE", key)
    name = required if kind in (None, b"none") else kind.decode()
    expires = left if left is not None and left != FOR_EVER else None
    return OddKey(key, name, required, expires) if name != required or expires is not None else None


# --- one lane ---------------------------------------------------------------------------------------------------------


async def _read_lane(questions: Questions, topic: str, number: int, groups: Collection[str], now: int) -> LaneView:
    stream = stream_of(topic, number)
    odd = [one for one in [await look_at_key(questions, stream, "stream")] if one]
    is_stream = not odd or odd[0].kind == "stream"
    exists = is_stream and await questions.of_key(stream, "EXISTS", stream) != 0
    info = await questions.of_key(stream, "XINFO", "STREAM", stream) if exists else None
    told = await questions.of_key(stream, "XINFO", "GROUPS", stream) if info is not None else None
    on_stream = {pairs["name"].decode(): pairs for pairs in map(pairs_of, told or ())}
    odd += [one for group in sorted({*groups, *on_stream}) for one in await _odd_keys(questions, topic, number, group)]
    if info is None or told is None:
        return LaneView(stream, exists, odd=odd)
    view = _stream_view(stream, pairs_of(info))
    wrong = {one.key for one in odd if one.kind != one.required}
    found = {
        name: await _read_group(questions, view, LaneKeys(topic, number, name), pairs, wrong, now)
        for name, pairs in on_stream.items()
    }
    return LaneView(
        stream, exists, view.length, view.first, view.generated, view.deleted, view.added, groups=found, odd=odd
    )


def _stream_view(stream: str, info: Mapping[str, Any]) -> LaneView:
    return LaneView(
        stream,
        exists=True,
        length=info["length"],
        first=entry_id(info["first-entry"][0]) if info["first-entry"] else None,
        generated=entry_id(info["last-generated-id"]),
        deleted=entry_id(info.get("max-deleted-entry-id", b"0-0")),
        added=info.get("entries-added"),
    )


async def _odd_keys(questions: Questions, topic: str, number: int, group: str) -> Sequence[OddKey]:
    keys = LaneKeys(topic, number, group)
    kinds = {keys.state: "hash", keys.attempts: "hash", keys.delayed: "zset", keys.waiting: "hash"}
    found = [await look_at_key(questions, key, kind) for key, kind in kinds.items()]
    return [one for one in found if one is not None]


async def _read_group(
    questions: Questions, lane: LaneView, keys: LaneKeys, told: Mapping[str, Any], wrong: Collection[str], now: int
) -> GroupOnLane:
    """told: of ``XINFO GROUPS``.  wrong: keys of another type, which are not asked."""
    group, delivered = told["name"].decode(), entry_id(told["last-delivered-id"])
    unfinished = await _unfinished(questions, lane, group, int(told["pending"]), delivered)
    held = None if keys.state in wrong else await questions.of_key(keys.state, "HGET", keys.state, "until")
    late = {} if {keys.delayed, keys.waiting} & set(wrong) else await _late(questions, keys, now)
    return GroupOnLane(
        delivered=delivered,
        read=told.get("entries-read"),
        behind=told.get("lag"),
        held_until=int(held) if held is not None else None,
        **unfinished,
        **late,
    )


async def _unfinished(
    questions: Questions, lane: LaneView, group: str, pending: int, delivered: EntryId
) -> dict[str, Any]:
    """What it has fetched, and what comes next."""
    oldest, elsewhere = await _pending(questions, lane.stream, group) if pending else (None, {})
    removed = list[str]()
    if oldest is not None and (lane.first is None or lane.first > oldest or lane.deleted >= oldest):
        removed = await _removed(questions, lane.stream, group)
    if oldest is None and lane.generated > delivered:
        oldest = await _next(questions, lane.stream, delivered)
    return {"pending": pending, "oldest": oldest, "removed": removed, "elsewhere": elsewhere}


async def _pending(questions: Questions, stream: str, group: str) -> tuple[EntryId | None, dict[str, int]]:
    """The oldest, and who else has some."""
    summary: Any = await questions.of_key(stream, "XPENDING", stream, group)
    if not summary or not summary["pending"]:
        return None, {}
    others = {one["name"].decode(): int(one["pending"]) for one in summary["consumers"]}
    return entry_id(summary["min"]), {name: count for name, count in others.items() if name != CONSUMER}


async def _next(questions: Questions, stream: str, delivered: EntryId) -> EntryId | None:
    """The first entry that it has not had."""
    found: Any = await questions.of_key(stream, "XRANGE", stream, shown_id(after(delivered)), "+", "COUNT", 1)
    return entry_id(found[0][0]) if found else None


async def _removed(questions: Questions, stream: str, group: str) -> list[str]:
    """Of the oldest that are pending, those that are no more in the stream, and pending still: not finished since."""
    found = await _pending_ids(questions, stream, group, "-", "+")
    gone = [name for name in found if await questions.of_key(stream, "XRANGE", stream, name, name) == []]
    return [name for name in gone if await _pending_ids(questions, stream, group, name, name)]


async def _pending_ids(questions: Questions, stream: str, group: str, first: str, last: str) -> list[str]:
    command = ("XPENDING", stream, group, first, last, PENDING_CHECKED)
    told: Any = await questions.of_key(stream, *command, parse_detail=True)
    return [one["message_id"].decode() for one in told or ()]


async def _late(questions: Questions, keys: LaneKeys, now: int) -> dict[str, Any]:
    """Late retries.  How many there are is asked again where another number has a message: one may have gone or come
    in between.
    """
    away = await questions.of_key(keys.delayed, "ZCARD", keys.delayed)
    kept = await questions.of_key(keys.waiting, "HLEN", keys.waiting)
    if away != kept and away != await questions.of_key(keys.delayed, "ZCARD", keys.delayed):
        kept = away
    if away is None or kept is None:
        return {}  # which is said among what was refused
    overdue, due = await _due(questions, keys.delayed, now) if away else (0, None)
    return {"away": away, "kept": kept, "overdue": overdue, "due": due}


async def _due(questions: Questions, delayed: str, now: int) -> tuple[int, int | None]:
    """How many should have come back, and when the first should."""
    overdue = await questions.of_key(delayed, "ZCOUNT", delayed, "-inf", now)
    names: Any = await questions.of_key(delayed, "ZRANGE", delayed, 0, 0)
    due = await questions.of_key(delayed, "ZSCORE", delayed, names[0]) if names else None
    return int(overdue or 0), None if due is None else int(float(due))
