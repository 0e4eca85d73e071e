"""Safe shelter: declaring topics and groups.

Declaring creates what is missing and never weakens or deletes; what is there otherwise is left alone and said (S1).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiormq.connection import Connection
from aiormq.exceptions import AMQPError, ChannelAccessRefused, ChannelPreconditionFailed

from reliamq.spi import Finding, GroupSpec, Severity, TopicSpec
from reliamq_rabbitmq.audit.audit import audit
from reliamq_rabbitmq.catalog.facts import TopicFacts, write_facts
from reliamq_rabbitmq.catalog.names import check_names, lane_queue
from reliamq_rabbitmq.catalog.topology import count_lanes, open_topology
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.connection import FAILURES, open_connection, unavailable

__all__ = ["RabbitmqStorage", "open_storage"]

NOT_LOWERED = "It was declared with more before, and declaring never lowers; nothing is lost."
ALIKE = "Declare it with what every user of it needs."


class RabbitmqStorage:
    """A :class:`~reliamq.spi.Storage`."""

    def __init__(self, connection: Connection, settings: RabbitmqSettings) -> None:
        self._connection, self._settings = connection, settings

    async def declare(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Create what is missing; see the contract.  Raises ConfigurationError for names that are too long."""
        findings: list[Finding] = []
        for spec in topics:
            for name in ("", *(group.name for group in spec.groups)):
                check_names(spec.name, name)
            try:
                findings += await self._declare(spec)
            except (ChannelPreconditionFailed, ChannelAccessRefused) as error:
                findings.append(_refused(spec, error))
            except FAILURES as error:
                raise unavailable(self._settings, f"declaring topic {spec.name}", error) from error
        return findings

    async def audit(self, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
        """Read the live values; see the contract."""
        return await audit(self._connection, self._settings, topics)

    async def _declare(self, spec: TopicSpec) -> Sequence[Finding]:
        async with open_topology(self._connection, self._settings) as topology:
            await topology.topic(spec.name)
        facts = await write_facts(self._connection, self._settings, spec.name, TopicFacts(spec.max_message_bytes))
        findings = list(_size_findings(spec, facts))
        for group in spec.groups:
            findings += await self._declare_group(spec, group)
        return findings

    async def _declare_group(self, spec: TopicSpec, group: GroupSpec) -> Sequence[Finding]:
        there = await count_lanes(self._connection, self._settings, spec.name, group.name)
        lanes = there or self._settings.lanes
        async with open_topology(self._connection, self._settings) as topology:
            if not there:
                await topology.mark(spec.name, group.name, lanes)
                lanes = await count_lanes(self._connection, self._settings, spec.name, group.name)
            await topology.group(spec.name, group.name, lanes)
        return _lane_findings(spec, group, lanes, self._settings.lanes)


def _size_findings(spec: TopicSpec, facts: TopicFacts) -> Sequence[Finding]:
    limit, asked = facts.max_message_bytes, spec.max_message_bytes
    if limit == asked:
        return ()
    severity, why, fix = Severity.NOTE, NOT_LOWERED, ALIKE
    if limit < asked:
        severity = Severity.RISKS
        why = "It was declared with less before; what is larger is rejected as too large."
        fix = "Drain and delete the topic's queue '/facts', and declare it again."
    return [Finding(severity, f"topic {spec.name}", "max_message_bytes", str(limit), str(asked), why, fix, "S1")]


def _lane_findings(spec: TopicSpec, group: GroupSpec, lanes: int, asked: int) -> Sequence[Finding]:
    if lanes == asked:
        return ()
    why = "So many workers of it can share the topic; nothing is lost."
    fix = "Ask for what is there: lanes that are added put keys out of order."
    subject = f"group {group.name} of topic {spec.name}"
    return [Finding(Severity.NOTE, subject, "lanes", str(lanes), str(asked), why, fix, "S1")]


def _refused(spec: TopicSpec, error: AMQPError) -> Finding:
    why = f"The broker refuses to have it as asked ({error}): what is there may lose messages, or keep no order."
    queues = lane_queue(spec.name, "GROUP", 0)
    fix = (
        f"Drain and delete what is in the way ({queues} and the like), declare it again; or let this user configure it."
    )
    return Finding(Severity.LOSES, f"topic {spec.name}", "queues", "otherwise", "quorum queues", why, fix, "S1")


@asynccontextmanager
async def open_storage(settings: RabbitmqSettings) -> AsyncIterator[RabbitmqStorage]:
    """Connect and close.  Raises BrokerUnavailable."""
    async with open_connection(settings, "storage") as connection:
        yield RabbitmqStorage(connection, settings)
