"""The audit: every question about what keeps messages safe, put to the live cluster (S2).

It promises to change nothing, and that what could not be seen is a finding of its own and never a pass.  The management
API is asked first; where it tells nothing, AMQP is asked what it can tell.  What the answers mean is decided in
``topic``, ``queues`` and ``cluster``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

from aiormq.connection import Connection

from reliamq.spi import ConfigurationError, Durability, Finding, Severity, TopicSpec
from reliamq_rabbitmq.audit import cluster
from reliamq_rabbitmq.audit.answers import Binding, Exchange, Queue, Version
from reliamq_rabbitmq.audit.commands import Commands, pattern_of
from reliamq_rabbitmq.audit.management import Management, ManagementError, open_management
from reliamq_rabbitmq.audit.own import OWN, OWN_QUEUES, arguments_of
from reliamq_rabbitmq.audit.policies import Policies
from reliamq_rabbitmq.audit.probing import Probe
from reliamq_rabbitmq.audit.queues import Scene, queue_faults
from reliamq_rabbitmq.audit.rules import findings_of
from reliamq_rabbitmq.audit.topic import TopicView, missing_topic, topic_findings
from reliamq_rabbitmq.audit.unseen import Thing, unseen
from reliamq_rabbitmq.catalog.names import DELAYS_OVER, check_names, facts_queue, group_exchange, members_exchange
from reliamq_rabbitmq.catalog.topology import exchange_exists
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.connection import FAILURES, unavailable
from reliamq_rabbitmq.wire.versions import largest_message, version_of

__all__ = ["audit"]

T = TypeVar("T")
PAUSE_SECONDS = 0.5


async def audit(connection: Connection, settings: RabbitmqSettings, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
    """Everything there is to say about the cluster, these topics, their groups, and this client.

    Without topics it is judged as a cluster for replicated ones.  Raises BrokerUnavailable.
    """
    async with AsyncExitStack() as stack:
        management: Management | ManagementError
        try:
            management = await stack.enter_async_context(open_management(settings))
        except ManagementError as error:
            management = error
        try:
            return await _Audit(connection, settings, management, topics).everything()
        except FAILURES as error:
            raise unavailable(settings, "auditing", error) from error


@dataclass(frozen=True, slots=True)
class _Listing:
    """Exchanges and queues of all topics that are asked about.

    returning: lanes that what waited comes back to.
    """

    exchanges: Sequence[Exchange]
    queues: Sequence[Queue]
    returning: frozenset[str]

    def exchanges_of(self, topic: str) -> dict[str, Exchange]:
        """By name: the topic's, and its groups'."""
        group, members = group_exchange(topic, ""), members_exchange(topic, "")
        return {one.name: one for one in self.exchanges if one.name == topic or one.name.endswith((group, members))}

    def queues_of(self, topic: str) -> dict[str, Queue]:
        """By name: the topic's, and its groups'."""
        facts, lanes = facts_queue(topic), f"{group_exchange(topic, '')}/"
        return {one.name: one for one in self.queues if one.name == facts or lanes in one.name}


class _Audit:
    """Questions, and the findings so far.

    management: or why there is none.
    """

    def __init__(
        self,
        connection: Connection,
        settings: RabbitmqSettings,
        management: Management | ManagementError,
        topics: Sequence[TopicSpec],
    ) -> None:
        self._connection, self._settings, self._topics = connection, settings, topics
        self._management = management
        self._cluster = f"cluster {settings.url}"
        self._unseen: dict[Thing, Finding] = {}
        self._findings: list[Finding] = []
        durability = max((spec.durability for spec in topics), default=Durability.REPLICATED)
        self._scene = Scene(settings, Commands(settings), durability, version_of(connection) or None)

    async def everything(self) -> list[Finding]:
        await self._nodes()
        await self._policies()
        await self._cluster_wide()
        listing = await self._list([spec.name for spec in self._topics])
        for spec in self._topics:
            await self._topic(spec, listing)
        await self._own_queues(listing)
        self._findings += cluster.client_findings(self._settings, self._scene.durability)
        return [*self._findings, *self._unseen.values()]

    async def _seen(self, ask: Callable[[Management], Awaitable[T]], *things: Thing) -> T | None:
        """The answer; None after findings that these things could not be seen."""
        try:
            if isinstance(self._management, ManagementError):
                raise self._management
            return await ask(self._management)
        except ManagementError as error:
            if not error.reached:
                self._management = error  # the next question would wait as long
            for thing in things:
                self._unseen.setdefault(thing, unseen(self._cluster, thing, error))
            return None

    # --- what all queues are judged by -----------------------------------------------------------------------------

    async def _nodes(self) -> None:
        nodes = await self._seen(Management.nodes, Thing.NODES, Thing.WATERMARKS)
        if nodes is not None:
            commands, durability = self._scene.commands, self._scene.durability
            self._findings += cluster.node_findings(self._cluster, nodes, durability, commands)
            self._scene = replace(self._scene, nodes=nodes)

    async def _policies(self) -> None:
        told = await self._seen(Management.policies, Thing.POLICIES)
        if told is None:
            return
        policies = Policies(told)
        self._scene = replace(self._scene, policies=policies)
        for policy in policies.unreadable():
            why, fix = Thing.POLICIES.why, "Look yourself which queues it is for."
            found, required = f"pattern {policy.pattern}", "one that can be read"
            self._findings.append(Finding(Severity.UNSEEN, self._cluster, str(policy), found, required, why, fix))

    async def _list(self, topics: Sequence[str]) -> _Listing | None:
        """What the API tells of these topics; None if some of it cannot be seen, which was said then."""
        parts = [*(f"{topic}/" for topic in topics), OWN]
        exchanges = await self._seen(lambda management: management.exchanges(topics), Thing.BINDINGS)
        returning = await self._bindings(DELAYS_OVER)
        queues = await self._seen(lambda management: management.queues(parts), Thing.MEMBERS, Thing.LEADERS)
        if exchanges is None or returning is None or queues is None:
            return None
        return _Listing(exchanges, queues, frozenset(binding.destination for binding in returning))

    async def _bindings(self, exchange: str) -> Sequence[Binding] | None:
        return await self._seen(lambda management: management.bindings(exchange), Thing.BINDINGS)

    # --- topics ----------------------------------------------------------------------------------------------------

    async def _topic(self, spec: TopicSpec, listing: _Listing | None) -> None:
        try:
            for name in ("", *(group.name for group in spec.groups)):
                check_names(spec.name, name)
        except ConfigurationError as error:
            self._findings.append(_badly_named(spec, error))
            return
        # AMQP is asked first: the API may be that of another cluster
        if not await exchange_exists(self._connection, self._settings, spec.name):
            self._findings.append(missing_topic(spec))
            return
        scene = replace(self._scene, durability=spec.durability)
        findings = await self._looked_at(spec, listing, scene)
        if any(finding.severity is Severity.LOSES for finding in findings):
            # Somebody may be making it at this moment, or its nodes have not all heard of it
            await asyncio.sleep(PAUSE_SECONDS)
            findings = await self._looked_at(spec, await self._list([spec.name]), scene)
        self._findings += findings

    async def _looked_at(self, spec: TopicSpec, listing: _Listing | None, scene: Scene) -> Sequence[Finding]:
        view = await self._view(spec.name, listing)
        if view is None:
            return await Probe(self._connection, scene).topic(spec)
        if spec.name not in view.exchanges:
            return [_elsewhere(spec.name, self._settings), *await Probe(self._connection, scene).topic(spec)]
        return list(topic_findings(spec, view, scene))

    async def _view(self, topic: str, listing: _Listing | None) -> TopicView | None:
        """None if some of it cannot be seen, which was said then."""
        if listing is None:
            return None
        exchanges, bindings = listing.exchanges_of(topic), dict[str, Sequence[Binding]]()
        for exchange in exchanges:
            told = await self._bindings(exchange)
            if told is None:
                return None
            bindings[exchange] = told
        return TopicView(exchanges, listing.queues_of(topic), bindings, listing.returning)

    async def _own_queues(self, listing: _Listing | None) -> None:
        """Those that reliamq has for all topics, as far as they are there."""
        if listing is None:
            self._findings += await Probe(self._connection, self._scene).own_queues()
            return
        faults, scene = [], replace(self._scene, family=pattern_of(OWN, end=""))
        for queue in listing.queues:
            expected = arguments_of(queue.name, self._settings.replicas)
            if expected is not None:
                faults += [(queue.name, fault) for fault in queue_faults(queue, expected, scene)]
        self._findings += findings_of(OWN_QUEUES, faults)

    # --- the cluster -----------------------------------------------------------------------------------------------

    async def _cluster_wide(self) -> None:
        alarms = await self._seen(Management.alarms, Thing.ALARMS)
        self._findings += cluster.alarm_findings(alarms or ())
        versions = self._versions()
        self._findings += cluster.version_findings(self._cluster, versions)
        self._findings += cluster.size_findings(self._topics, largest_message(self._connection))
        if versions and min(versions) < cluster.WITHOUT_FLAG:
            flags = await self._seen(Management.feature_flags, Thing.STREAM_QUEUE)
            if flags is not None:
                self._findings += cluster.flag_findings(self._cluster, flags.get(cluster.FLAG, False))
        self._findings += cluster.untold_findings(self._cluster, self._scene.version, self._settings)

    def _versions(self) -> list[Version]:
        """Of all nodes where they are told, else of the one that this client is connected to."""
        told = [node.version for node in self._scene.nodes or () if node.version is not None]
        return told or ([self._scene.version] if self._scene.version is not None else [])


def _badly_named(spec: TopicSpec, error: ConfigurationError) -> Finding:
    why, fix = "It can be neither declared nor published to.", "Give it a shorter name."
    return Finding(Severity.LOSES, f"topic {spec.name}", "name", f"too long ({error})", "shorter", why, fix)


def _elsewhere(topic: str, settings: RabbitmqSettings) -> Finding:
    why = "What is told of another cluster says nothing about this one; AMQP was asked what it can tell."
    fix = "Set 'management_url' to the management API of the cluster that the messages go to."
    found = f"it knows no such topic, at {settings.management}"
    return Finding(Severity.UNSEEN, f"topic {topic}", "management API", found, "that of this cluster", why, fix)
