"""Where given-up messages rest, in a table of their own.

A dead letter keeps the original bytes and headers and says who gave up, when and why (C5); it does not expire.
The row's key holds the time of death too: removing one then cannot take with it another that is put at the same moment.
Of several with one topic, group and id the last counts.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from reliamq.spi import BrokerUnavailable, DeadLetterRecord, Outcome, Rejection, RejectionReason
from reliamq_kafka.catalog.own_topics import DEAD_LETTERS_TOPIC
from reliamq_kafka.catalog.tables import Row, Table, TableWriter, open_writer
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, open_admin
from reliamq_kafka.wire.records import OURS, Headers, headers_of, message_of

__all__ = ["KafkaDeadLetters", "dead_letters_table", "open_dead_letters"]

LARGEST_ROW = 99 * 1024 * 1024
"""A request to Kafka can have 100 MiB: what fits into a topic fits here too, with why it died beside it."""
LONGEST_TEXT = 256 * 1024
"""Characters that are kept of a reason and of a traceback: else a huge one could keep its message from resting here."""
KEY = OURS + "key"


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """What tells dead letters apart: which message, for whom, and which of its deaths."""

    topic: str
    group: str
    message_id: str
    died_at: str

    @classmethod
    def of(cls, record: DeadLetterRecord) -> Name:
        """The name of one."""
        return cls(record.message.topic, record.group, record.message.id, record.died_at.isoformat())

    @classmethod
    def read(cls, key: bytes) -> Name:
        """From a row's key."""
        return cls(*json.loads(key))

    @property
    def key(self) -> bytes:
        """The row's key."""
        return json.dumps([self.topic, self.group, self.message_id, self.died_at]).encode()

    @property
    def identity(self) -> tuple[str, str, str]:
        """Without the time of death: of these the last counts."""
        return self.topic, self.group, self.message_id


class KafkaDeadLetters:
    """A :class:`~reliamq.spi.DeadLetters`."""

    def __init__(self, settings: KafkaSettings, table: Table, writer: TableWriter) -> None:
        self._settings, self._table, self._writer = settings, table, writer

    async def add(self, records: Sequence[DeadLetterRecord], *, deadline: float) -> Sequence[Outcome]:
        """Store dead letters; see the contract."""
        rows: dict[int, Row] = {}
        outcomes: dict[int, Outcome] = {}
        for index, record in enumerate(records):
            try:
                rows[index] = _row(record)
            except UnicodeEncodeError as error:
                detail = f"a text of it cannot be stored: {error}"
                outcomes[index] = Rejection(record.message.id, RejectionReason.INVALID, detail, error)
        names = [records[index].message.id for index in rows]
        stored = await self._writer.write(list(rows.values()), names=names, deadline=deadline)
        outcomes |= dict(zip(rows, stored, strict=True))
        return [outcomes[index] for index in range(len(records))]

    async def find(
        self, *, topic: str | None = None, group: str | None = None, message_id: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetterRecord]:
        """Those that match, in the order in which they were stored; see the contract.

        The log is read twice, so that memory holds the names of all and the messages only of those that are found.
        """
        last = {
            name.identity: offset
            for name, offset in await self._offsets()
            if (topic in (None, name.topic)) and (group in (None, name.group)) and message_id in (None, name.message_id)
        }
        wanted = set(sorted(last.values())[: max(0, limit)])
        found: list[DeadLetterRecord] = []

        def take(row: Row) -> None:
            if row.offset in wanted:
                found.append(_record(row))

        if wanted:
            try:
                await self._table.read(take)
            except (KeyError, ValueError) as error:
                raise self._foreign(error) from error
        return found

    async def remove(self, records: Sequence[DeadLetterRecord]) -> int:
        """Remove these; see the contract."""
        if not records:
            return 0
        deaths: dict[tuple[str, str, str], list[Name]] = {}
        for name, _ in await self._offsets():
            deaths.setdefault(name.identity, []).append(name)
        asked = {Name.of(record) for record in records}
        doomed = [names for names in deaths.values() if names[-1] in asked]
        # The last one last: if this stops halfway, none that was replaced comes to light again
        await self._writer.remove([name.key for names in doomed for name in names])
        return len(doomed)

    async def _offsets(self) -> Sequence[tuple[Name, int]]:
        """What is there, in order."""
        offsets: dict[bytes, int] = {}

        def take(row: Row) -> None:
            offsets.pop(row.key, None)
            if row.value is not None:
                offsets[row.key] = row.offset

        await self._table.read(take)
        try:
            return [(Name.read(key), offset) for key, offset in offsets.items()]
        except (ValueError, TypeError) as error:
            raise self._foreign(error) from error

    def _foreign(self, error: Exception) -> BrokerUnavailable:
        detail = f"{DEAD_LETTERS_TOPIC} holds a row that reliamq did not write: {error!r}"
        return BrokerUnavailable(self._settings.url, detail)


def _row(record: DeadLetterRecord) -> Row:
    facts = {
        "handler": record.handler,
        "reason": record.reason[:LONGEST_TEXT],
        "traceback": record.traceback[-LONGEST_TEXT:],
        "attempts": str(record.attempts),
        "position": record.position,
    }
    headers: Headers = headers_of(record.message)
    headers += [(OURS + name, text.encode()) for name, text in facts.items()]
    if record.message.key is not None:
        headers.append((KEY, record.message.key))
    return Row(Name.of(record).key, record.message.body, headers)


def _record(row: Row) -> DeadLetterRecord:
    name = Name.read(row.key)
    facts = {key.removeprefix(OURS): value for key, value in row.headers if key.startswith(OURS)}
    return DeadLetterRecord(
        message=message_of(name.topic, facts.get("key"), row.value, row.headers),
        group=name.group,
        handler=facts["handler"].decode(),
        reason=facts["reason"].decode(),
        traceback=facts["traceback"].decode(),
        attempts=int(facts["attempts"]),
        died_at=datetime.fromisoformat(name.died_at),
        position=facts["position"].decode(),
    )


def dead_letters_table(admin: Admin, settings: KafkaSettings) -> Table:
    """The table, there or not."""
    return Table(admin, settings, DEAD_LETTERS_TOPIC, LARGEST_ROW)


@asynccontextmanager
async def open_dead_letters(settings: KafkaSettings) -> AsyncIterator[KafkaDeadLetters]:
    """Connect and close; the table is made when it is not there.  Raises BrokerUnavailable."""
    async with open_admin(settings) as admin:
        table = dead_letters_table(admin, settings)
        await table.create()
        async with open_writer(table, settings) as writer:
            yield KafkaDeadLetters(settings, table, writer)
