"""Safe shelter: declaring topics and groups.

Declaring creates what is missing in one transaction and never weakens or deletes (S1): a retention or a size limit is
raised when more is asked, and left when less is.  What the live file is like is told by the audit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence

from reliamq.embedded.audit import audit, durability_findings, limit_findings, missing_file_findings
from reliamq.embedded.database import Database
from reliamq.embedded.errors import StoreFailure
from reliamq.embedded.schema import TOPIC_SHIFT
from reliamq.spi import Durability, Finding, TopicSpec

__all__ = ["EmbeddedStorage"]

CREATE_TOPIC = """
INSERT INTO topic (id, name, last, retention, max_message_bytes)
SELECT id, :name, id << :shift, :retention, :limit FROM (SELECT coalesce(max(id), 0) + 1 AS id FROM topic)
WHERE true ON CONFLICT (name) DO NOTHING"""

RAISE_LIMITS = """
UPDATE topic SET retention = max(retention, :retention), max_message_bytes = max(max_message_bytes, :limit)
WHERE name = :name RETURNING retention, max_message_bytes"""

CREATE_GROUP = """
INSERT INTO group_ (topic_id, name, cursor)
SELECT id, :group, iif(:earliest, id << :shift, last) FROM topic WHERE name = :name
ON CONFLICT (topic_id, name) DO NOTHING"""


class EmbeddedStorage:
    """A :class:`~reliamq.spi.Storage` on one database."""

    def __init__(self, database: Database, durability: Durability) -> None:
        self._database, self._durability = database, durability

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Create what is missing; see the contract.  All of it is created, or nothing."""
        async with self._database.opened():
            differing = await self._declare(topics) if topics else []
        return [*durability_findings(topics, self._durability), *differing]

    async def _declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        try:
            # Cancelled here: all of it is created, or nothing; calling again is harmless
            return await self._database.write(
                lambda connection: [finding for spec in topics for finding in _declare(connection, spec)],
                wakes=frozenset(spec.name for spec in topics),
            )
        except StoreFailure as failure:
            raise failure.unavailable(self._database.location.url) from failure

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Read the live values; see the contract.  A file that is not there is a finding, and is not made."""
        if self._database.location.is_missing() and not self._database.is_open:
            found = missing_file_findings(self._database.location, topics)
        else:
            async with self._database.opened():
                found = await self._audit(topics)
        return [*durability_findings(topics, self._durability), *found]

    async def _audit(self, topics: Sequence[TopicSpec]) -> list[Finding]:
        try:
            return await self._database.read(lambda connection: audit(connection, self._database.location, topics))
        except StoreFailure as failure:
            raise failure.unavailable(self._database.location.url) from failure


def _declare(connection: sqlite3.Connection, spec: TopicSpec) -> Iterator[Finding]:
    values = {
        "name": spec.name,
        "retention": spec.retention.total_seconds(),
        "limit": spec.max_message_bytes,
        "shift": TOPIC_SHIFT,
    }
    connection.execute(CREATE_TOPIC, values)
    retention, limit = connection.execute(RAISE_LIMITS, values).fetchone()
    for group in spec.groups:
        connection.execute(CREATE_GROUP, {**values, "group": group.name, "earliest": group.start == "earliest"})
    yield from limit_findings(spec, retention, limit)
