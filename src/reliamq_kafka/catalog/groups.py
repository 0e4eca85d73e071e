"""Which groups were declared, in a table of their own.

Kafka forgets the offsets of a group that has no members for a week.  What is written here stays: that the group is
there, so that messages go on being routed to it (P3) and being kept for it (C9), where it began, and how long its topic
keeps what every group has finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from pydantic import BaseModel, ValidationError

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.catalog.own_topics import GROUPS_TOPIC
from reliamq_kafka.catalog.tables import Row, Table, open_writer
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Admin, group_id

__all__ = ["DeclaredGroup", "Groups", "retention_of"]

LARGEST_ROW = 1024 * 1024


@dataclass(frozen=True, slots=True)
class DeclaredGroup:
    """A group on a topic.

    first: by partition, the offset of the first message that is the group's.  retention: as its declarer asked.
    """

    topic: str
    group: str
    first: tuple[int, ...]
    retention: timedelta

    @property
    def id(self) -> str:
        """Kafka's name for it."""
        return group_id(self.topic, self.group)


class Value(BaseModel):
    """A row's value, as JSON.  Fields that a later version adds are ignored."""

    first: tuple[int, ...]
    retention_seconds: float


def retention_of(groups: Sequence[DeclaredGroup]) -> timedelta:
    """How long a topic with these groups keeps what all of them have finished: the longest that was asked."""
    return max((each.retention for each in groups), default=timedelta(0))


class Groups:
    """The declared groups of a cluster.  All raise BrokerUnavailable."""

    def __init__(self, admin: Admin, settings: KafkaSettings) -> None:
        self._settings = settings
        self._table = Table(admin, settings, GROUPS_TOPIC, LARGEST_ROW)

    async def create(self) -> None:
        """Have the table."""
        await self._table.create()

    async def all(self) -> Mapping[str, Sequence[DeclaredGroup]]:
        """By topic; empty on a cluster that has not seen reliamq."""
        found: dict[str, list[DeclaredGroup]] = {}
        for row in await self._table.rows():
            group = self._group(row)
            found.setdefault(group.topic, []).append(group)
        return found

    async def of(self, topic: str) -> Sequence[DeclaredGroup]:
        """The groups of one topic."""
        suffix = f"@{topic}".encode()
        return [self._group(row) for row in await self._table.rows(lambda key: key.endswith(suffix))]

    async def add(self, groups: Sequence[DeclaredGroup]) -> None:
        """Have these known, durably.  One that is there is replaced."""
        if not groups:
            return
        async with open_writer(self._table, self._settings) as writer:
            await writer.put([_row(group) for group in groups])

    def _group(self, row: Row) -> DeclaredGroup:
        name = row.key.decode(errors="replace")
        try:
            value = Value.model_validate_json(row.value or b"")
        except ValidationError as error:
            # Going on without it could remove what the group has not finished
            raise BrokerUnavailable(self._settings.url, f"{GROUPS_TOPIC}: cannot read '{name}': {error}") from error
        group, _, topic = name.rpartition("@")
        return DeclaredGroup(topic, group, value.first, timedelta(seconds=value.retention_seconds))


def _row(group: DeclaredGroup) -> Row:
    value = Value(first=group.first, retention_seconds=group.retention.total_seconds())
    return Row(group.id.encode(), value.model_dump_json().encode(), [])
