"""Safe departure: appending batches to the logs of topics.

A confirmation is given after the COMMIT that stored the message (P1), one outcome for each message in the order given
(P2); an id that the topic knows is stored once (P4).  Retries and callers' deadlines are the core's.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from reliamq.embedded.database import Database
from reliamq.embedded.errors import StoreFailure, is_bad_value
from reliamq.embedded.opening import publishing_limit
from reliamq.embedded.rows import LARGEST_MESSAGE, SIZE, columns_of, insert_messages
from reliamq.embedded.schema import BEHIND, number_in_topic
from reliamq.spi import Confirmation, Message, Outcome, Rejection, RejectionReason
from reliamq.spi.chains import Chains, fail, held_back, is_behind, send_in_waves

__all__ = ["EmbeddedPublisher"]

Columns = tuple[Any, ...]

ALLOCATE = """
UPDATE topic SET last = last + :count
WHERE name = :name AND EXISTS (SELECT 1 FROM group_ WHERE topic_id = topic.id)
RETURNING id, last, max_message_bytes"""

GROUPS = "SELECT g.name, g.id, g.cursor FROM group_ g JOIN topic t ON t.id = g.topic_id WHERE t.name = ?"

KNOWN = """
SELECT json_group_array(json_array(id, seq, only_group)) FROM message
WHERE topic_id = :topic AND id IN (SELECT value FROM json_each(:ids))"""

IS_UNFINISHED = """
SELECT EXISTS (SELECT 1 FROM delivery WHERE group_id = :group AND position = :seq)
    OR EXISTS (SELECT 1 FROM delivery WHERE group_id = :group AND seq = :seq AND position <> seq)"""

NEXT_POSITION = "UPDATE topic SET last = last + 1 WHERE id = ? RETURNING last"

DELIVER_AGAIN = "INSERT INTO delivery (group_id, position, seq, state, due_at) VALUES (?, ?, ?, ?, 0)"


class EmbeddedPublisher:
    """A :class:`~reliamq.spi.Publisher` on one database; it has no state but that."""

    gathering_rounds = 1

    def __init__(self, database: Database) -> None:
        self._database = database

    def route(self, message: Message) -> None:
        """All are stored in one file, one transaction after another."""

    async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
        """Append a batch in one transaction; see the contract."""
        if not batch:
            return ()
        try:
            rows = [columns_of(message) for message in batch]
            limit = self._database.location.settings.max_bytes
            # Cancelled here: the transaction runs to its end all the same; whoever repeats it gets duplicates (P4)
            return await self._database.write(
                lambda connection: _append(connection, batch, rows, limit, chained),
                wakes=frozenset(message.topic for message in batch),
                deadline=deadline,
            )
        except StoreFailure as failure:
            if failure.reason is RejectionReason.UNAVAILABLE:
                raise failure.unavailable(self._database.location.url) from failure
            return [failure.outcome(message.id) for message in batch]
        except Exception as error:
            if not is_bad_value(error):
                raise
            if len(batch) == 1:
                return (Rejection(batch[0].id, RejectionReason.INVALID, f"SQLite cannot store it: {error}", error),)
            if chained:
                return await send_in_waves(lambda wave: self.send(wave, deadline=deadline), batch, deadline)
            return [outcome for one in batch for outcome in await self.send((one,), deadline=deadline)]


def _append(
    connection: sqlite3.Connection,
    batch: Sequence[Message],
    rows: Sequence[Columns],
    max_bytes: int | None,
    chained: bool,
) -> list[Outcome]:
    with publishing_limit(connection, max_bytes):
        return _append_by_topic(connection, batch, rows, chained)


def _append_by_topic(
    connection: sqlite3.Connection, batch: Sequence[Message], rows: Sequence[Columns], chained: bool
) -> list[Outcome]:
    by_topic: dict[str, list[int]] = {}
    for index, message in enumerate(batch):
        by_topic.setdefault(message.topic, []).append(index)
    if len(by_topic) == 1:
        return _append_to_topic(connection, batch[0].topic, batch, rows, chained)
    outcomes: dict[int, Outcome] = {}
    for topic, indexes in by_topic.items():
        messages, columns = [batch[i] for i in indexes], [rows[i] for i in indexes]
        outcomes.update(zip(indexes, _append_to_topic(connection, topic, messages, columns, chained), strict=True))
    return [outcomes[index] for index in range(len(batch))]


def _append_to_topic(
    connection: sqlite3.Connection, topic: str, messages: Sequence[Message], rows: Sequence[Columns], chained: bool
) -> list[Outcome]:
    allocated = connection.execute(ALLOCATE, {"name": topic, "count": len(messages)}).fetchone()
    if allocated is None:
        unroutable = {n: _unroutable(one, "is not declared, or has no group") for n, one in enumerate(messages)}
        return list({**unroutable, **(_behind(messages, unroutable) if chained else {})}.values())
    topic_id, last, limit = allocated
    first = last - len(messages) + 1
    refused = _refusals(connection, topic, messages, rows, min(limit, LARGEST_MESSAGE))
    if refused and chained:
        refused |= _behind(messages, refused)
    numbered = [(seq, columns) for seq, columns in enumerate(rows, first) if seq - first not in refused]
    stored = insert_messages(connection, topic_id, numbered)
    if stored == len(messages):
        return [Confirmation(message.id, str(number_in_topic(seq))) for seq, message in enumerate(messages, first)]
    known = _Known(connection, topic, topic_id, messages)
    return [refused.get(seq - first) or known.confirmation(message, seq) for seq, message in enumerate(messages, first)]


def _refusals(
    connection: sqlite3.Connection, topic: str, messages: Sequence[Message], rows: Sequence[Columns], limit: int
) -> dict[int, Rejection]:
    """Which messages of the batch are refused, by their place in it, and why; nearly always none."""
    refused: dict[int, Rejection] = {}
    if any(message.only_group is not None for message in messages):
        groups = {name for name, *_ in connection.execute(GROUPS, (topic,)).fetchall()}
        for index, message in enumerate(messages):
            if message.only_group is not None and message.only_group not in groups:
                refused[index] = _unroutable(message, f"has no group '{message.only_group}'")
    for index, columns in enumerate(rows):
        if columns[SIZE] > limit:
            detail = f"{columns[SIZE]} bytes are over the limit of {limit} of topic '{topic}'"
            refused[index] = Rejection(messages[index].id, RejectionReason.TOO_LARGE, detail)
    return refused


def _behind(messages: Sequence[Message], refused: Mapping[int, Rejection]) -> dict[int, Rejection]:
    """Those behind a refused one of their key."""
    chains, behind = Chains(), dict[int, Rejection]()
    for index, message in enumerate(messages):
        place = chains.join(message)
        if is_behind(place):
            behind[index] = held_back(message.id)
        elif index in refused:
            fail(place)
    return behind


def _unroutable(message: Message, why: str) -> Rejection:
    detail = f"topic '{message.topic}' {why}, so nobody would receive it; declare it first"
    return Rejection(message.id, RejectionReason.UNROUTABLE, detail)


class _Known:
    """The stored messages of a batch in which some were stored before."""

    def __init__(self, connection: sqlite3.Connection, topic: str, topic_id: int, messages: Sequence[Message]) -> None:
        self._connection, self._topic, self._topic_id = connection, topic, topic_id
        ids = json.dumps([message.id for message in messages])
        (found,) = connection.execute(KNOWN, {"topic": topic_id, "ids": ids}).fetchone()
        self._by_id = {message_id: (seq, only_group) for message_id, seq, only_group in json.loads(found)}

    def confirmation(self, message: Message, seq: int) -> Confirmation:
        """Confirm a message that was to be stored as ``seq``; for a known one bring it back to its only group."""
        stored, stored_for = self._by_id[message.id]
        if stored != seq and message.only_group is not None:
            self._deliver_again(stored, stored_for, message.only_group)
        return Confirmation(message.id, str(number_in_topic(stored)), duplicate=stored != seq)

    def _deliver_again(self, seq: int, stored_for: str | None, group: str) -> None:
        groups = {name: (id_, cursor) for name, id_, cursor in self._connection.execute(GROUPS, (self._topic,))}
        group_id, cursor = groups[group]
        (unfinished,) = self._connection.execute(IS_UNFINISHED, {"group": group_id, "seq": seq}).fetchone()
        to_come = seq > cursor and stored_for in (None, group)
        if unfinished or to_come:
            return
        (position,) = self._connection.execute(NEXT_POSITION, (self._topic_id,)).fetchone()
        self._connection.execute(DELIVER_AGAIN, (group_id, position, seq, BEHIND))
