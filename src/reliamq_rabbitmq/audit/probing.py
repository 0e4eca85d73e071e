"""What AMQP alone can tell: whether exchanges and queues are there, and declared as reliamq declares them.

Asking that means declaring again, as they are: the broker answers that it is so, or names what differs.  It is asked
only of what is there, so that nothing is created.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiormq.connection import Connection
from aiormq.exceptions import (
    AMQPError,
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)

from reliamq.spi import Finding, Severity, TopicSpec
from reliamq_rabbitmq.audit.commands import DECLARE, pattern_of
from reliamq_rabbitmq.audit.own import OWN_QUEUES, own_arguments
from reliamq_rabbitmq.audit.queues import MEMBERS, Scene, few_members
from reliamq_rabbitmq.audit.rules import Fault, findings_of
from reliamq_rabbitmq.audit.topic import group_subject, missing_group
from reliamq_rabbitmq.catalog.names import (
    GROUP_SIZE,
    facts_queue,
    group_exchange,
    lane_queue,
    ledger_queue,
    members_exchange,
    quorum_arguments,
)
from reliamq_rabbitmq.catalog.topology import count_lanes, exchange_exists
from reliamq_rabbitmq.wire.connection import answered, short_channel

__all__ = ["Probe"]

DIFFERS = re.compile(r"inequivalent arg '([^']+)' for .*received .* but current is (?:[^']*'([^']*)'|(\w+))")
Faults = AsyncIterator[tuple[str, Fault]]


class Probe:
    """Declares again, on channels of their own: each no closes one."""

    def __init__(self, connection: Connection, scene: Scene) -> None:
        self._connection, self._settings, self._scene = connection, scene.settings, scene

    async def topic(self, spec: TopicSpec) -> list[Finding]:
        """A topic whose exchange is there.  Raises what the client raises."""
        subject, facts = f"topic {spec.name}", facts_queue(spec.name)
        findings = await _said(subject, self._exchange(spec.name, "fanout"))
        findings += await _said(subject, self._queue(facts, quorum_arguments(self._settings.replicas)))
        for group in spec.groups:
            findings += await self._group(spec.name, group.name)
        return findings

    async def own_queues(self) -> list[Finding]:
        """Those that reliamq has for all topics, as far as they are there."""
        return await _said(OWN_QUEUES, self._own_queues())

    async def _own_queues(self) -> Faults:
        for name, arguments in own_arguments(self._settings.replicas):
            async for named in self._queue(name, arguments, may_be_missing=True):
                yield named

    async def _group(self, topic: str, group: str) -> list[Finding]:
        if not await exchange_exists(self._connection, self._settings, group_exchange(topic, group)):
            return [missing_group(topic, group)]
        return await _said(group_subject(topic, group), self._lanes(topic, group))

    async def _lanes(self, topic: str, group: str) -> Faults:
        async for named in self._exchange(group_exchange(topic, group), "topic"):
            yield named
        async for named in self._exchange(members_exchange(topic, group), "fanout"):
            yield named
        arguments = quorum_arguments(self._settings.replicas)
        for lane in range(await count_lanes(self._connection, self._settings, topic, group)):
            for name in (lane_queue(topic, group, lane), ledger_queue(topic, group, lane)):
                async for named in self._queue(name, arguments):
                    yield named

    # --- one exchange, one queue -----------------------------------------------------------------------------------

    async def _exchange(self, name: str, kind: str) -> Faults:
        seconds, fix = self._settings.request_timeout_seconds, self._scene.commands.replace_exchange(name)
        try:
            async with short_channel(self._connection, self._settings) as channel:
                await answered(channel.exchange_declare(name, passive=True), seconds)
                await answered(channel.exchange_declare(name, exchange_type=kind, durable=True), seconds)
        except ChannelNotFoundEntity:
            yield name, _missing("exchange")
        except ChannelAccessRefused as error:
            yield name, _forbidden("exchange", error)
        except ChannelPreconditionFailed as error:
            yield name, _otherwise("exchange", f"durable {kind} exchange", error, fix)

    async def _queue(self, name: str, arguments: Mapping[str, Any], *, may_be_missing: bool = False) -> Faults:
        fix = self._scene.commands.replace_queue(name, quorum=True)
        try:
            await self._declare_again(name, arguments)
        except ChannelNotFoundEntity:
            if not may_be_missing:
                yield name, _missing("queue")
        except ChannelLockedResource:
            why = "It is deleted, messages and all, with its owner's connection."
            yield name, Fault(Severity.LOSES, "exclusive", "true", "false", why, fix)
        except ChannelAccessRefused as error:
            yield name, _forbidden("queue", error)
        except ChannelPreconditionFailed as error:
            differing, current = _difference(error)
            size = int(current) if differing == GROUP_SIZE and current.isdigit() else None
            if size is None or size == arguments[GROUP_SIZE]:
                yield name, _otherwise("queue", "a quorum queue as reliamq declares it", error, fix)
                return
            # It was made with another number of members; what else differs is asked with that one.
            if size < MEMBERS:
                grow = f"{self._scene.commands.grow([], pattern_of(name))}; and let 'management_url' show its members."
                yield name, few_members(size, grow, self._scene.durability)
            async for named in self._queue(name, {**arguments, GROUP_SIZE: size}):
                yield named

    async def _declare_again(self, name: str, arguments: Mapping[str, Any]) -> None:
        seconds = self._settings.request_timeout_seconds
        async with short_channel(self._connection, self._settings) as channel:
            await answered(channel.queue_declare(name, passive=True), seconds)
            await answered(channel.queue_declare(name, durable=True, arguments=dict(arguments)), seconds)


async def _said(subject: str, faults: Faults) -> list[Finding]:
    return findings_of(subject, [named async for named in faults])


def _missing(what: str) -> Fault:
    why = "Messages are refused, or confirmed without it where another group gets them; what it held is gone."
    return Fault(Severity.LOSES, f"{what}s", "missing", "declared", why, DECLARE)


def _forbidden(what: str, error: AMQPError) -> Fault:
    why, fix = "What may not be asked is not known to be safe.", f"Let this user configure it; the broker says: {error}"
    return Fault(Severity.UNSEEN, f"{what}s", "not permitted to be asked about", "as declared", why, fix)


def _otherwise(what: str, required: str, error: AMQPError, fix: str) -> Fault:
    differing, current = _difference(error)
    why = "Declared otherwise it may drop messages, have them on one node alone, or hand them out in any order."
    return Fault(Severity.LOSES, f"{what}s", f"otherwise: {differing} is {current}", required, why, fix)


def _difference(error: AMQPError) -> tuple[str, str]:
    """Which argument differs, and what it is; as the broker's sentence says it."""
    found = DIFFERS.search(str(error))
    if found is None:
        return "something", f"what the broker says: {error}"
    return found[1], found[2] if found[2] is not None else found[3]
