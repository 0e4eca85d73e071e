"""The audit: every question about what keeps messages safe, put to the live cluster (S2).

It promises to change nothing, and that what could not be seen is a finding of its own and never a pass.  The management
API is asked first; where it tells nothing, AMQP is asked what it can tell.  What the answers mean is decided in
``topic``, ``queues`` and ``cluster``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeVar

from aiormq.connection import Connection

from reliamq.spi import Durability, Finding, Severity, TopicSpec
from reliamq_rabbitmq.audit import cluster
from reliamq_rabbitmq.audit.answers import Binding, Version, version_of
from reliamq_rabbitmq.audit.commands import Commands
from reliamq_rabbitmq.audit.management import Management, ManagementError, open_management
from reliamq_rabbitmq.audit.own import OWN, OWN_QUEUES, arguments_of
from reliamq_rabbitmq.audit.policies import Policies
from reliamq_rabbitmq.audit.probing import Probe
from reliamq_rabbitmq.audit.queues import Scene, queue_faults
from reliamq_rabbitmq.audit.rules import findings_of
from reliamq_rabbitmq.audit.topic import TopicView, missing_topic, topic_findings
from reliamq_rabbitmq.audit.unseen import Thing, unseen
from reliamq_rabbitmq.catalog.names import DELAYS_OVER, group_exchange
from reliamq_rabbitmq.catalog.topology import exchange_exists
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.connection import FAILURES, unavailable

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
        version = version_of(connection.server_properties.get("version"))
        self._scene = Scene(settings, Commands(settings), durability, version)

    async def everything(self) -> list[Finding]:
        await self._nodes()
        await self._policies()
        returning = await self._returning()
        for spec in self._topics:
            await self._topic(spec, returning)
        await self._own_queues()
        await self._cluster_wide()
        self._findings += cluster.client_findings(self._settings, self._scene.durability)
        return [*self._findings, *self._unseen.values()]

    async def _seen(self, ask: Callable[[Management], Awaitable[T]], *things: Thing) -> T | None:
        """The answer; None after findings that these things could not be seen."""
        try:
            if isinstance(self._management, ManagementError):
                raise self._management
            return await ask(self._management)
        except ManagementError as error:
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

    async def _returning(self) -> frozenset[str] | None:
        """Lanes that what waited comes back to; None: not known."""
        bindings = await self._bindings(DELAYS_OVER)
        return None if bindings is None else frozenset(binding.destination for binding in bindings)

    # --- topics ----------------------------------------------------------------------------------------------------

    async def _topic(self, spec: TopicSpec, returning: frozenset[str] | None) -> None:
        # AMQP is asked first: the API may be that of another cluster
        if not await exchange_exists(self._connection, self._settings, spec.name):
            self._findings.append(missing_topic(spec))
            return
        scene = replace(self._scene, durability=spec.durability)
        findings = await self._looked_at(spec, returning, scene)
        if any(finding.severity is Severity.LOSES for finding in findings):
            # Somebody may be making it at this moment, or its nodes have not all heard of it
            await asyncio.sleep(PAUSE_SECONDS)
            findings = await self._looked_at(spec, await self._returning(), scene)
        self._findings += findings

    async def _looked_at(self, spec: TopicSpec, returning: frozenset[str] | None, scene: Scene) -> Sequence[Finding]:
        view = await self._view(spec.name, returning)
        if view is None:
            return await Probe(self._connection, scene).topic(spec)
        if spec.name not in view.exchanges:
            return [_elsewhere(spec.name, self._settings), *await Probe(self._connection, scene).topic(spec)]
        return list(topic_findings(spec, view, scene))

    async def _view(self, topic: str, returning: frozenset[str] | None) -> TopicView | None:
        """What the API tells of a topic; None if some of it cannot be seen, which was said then."""
        exchanges = await self._seen(lambda management: management.exchanges(topic), Thing.BINDINGS)
        queues = await self._seen(lambda management: management.queues(f"{topic}/"), Thing.MEMBERS, Thing.LEADERS)
        if exchanges is None or queues is None:
            return None
        ends = group_exchange(topic, "")
        groups = [one.name for one in exchanges if one.name.endswith(ends)]
        bindings = {}
        for exchange in (topic, *groups):
            told = await self._bindings(exchange)
            if told is None:
                return None
            bindings[exchange] = told
        ours = {queue.name: queue for queue in queues}
        return TopicView({one.name: one for one in exchanges}, ours, bindings, returning)

    async def _bindings(self, exchange: str) -> Sequence[Binding] | None:
        return await self._seen(lambda management: management.bindings(exchange), Thing.BINDINGS)

    async def _own_queues(self) -> None:
        """Those that reliamq has for all topics, as far as they are there."""
        queues = await self._seen(lambda management: management.queues(OWN), Thing.MEMBERS, Thing.LEADERS)
        if queues is None:
            self._findings += await Probe(self._connection, self._scene).own_queues()
            return
        faults = []
        for queue in queues:
            expected = arguments_of(queue.name, self._settings.replicas)
            if expected is not None:
                faults += [(queue.name, fault) for fault in queue_faults(queue, expected, self._scene)]
        self._findings += findings_of(OWN_QUEUES, faults)

    # --- the cluster -----------------------------------------------------------------------------------------------

    async def _cluster_wide(self) -> None:
        alarms = await self._seen(Management.alarms, Thing.ALARMS)
        self._findings += cluster.alarm_findings(alarms or ())
        versions = self._versions()
        self._findings += cluster.version_findings(self._cluster, versions)
        self._findings += cluster.size_findings(self._topics, min(versions, default=None))
        if versions and min(versions) < cluster.WITHOUT_FLAG:
            flags = await self._seen(Management.feature_flags, Thing.STREAM_QUEUE)
            if flags is not None:
                self._findings += cluster.flag_findings(self._cluster, flags.get(cluster.FLAG, False))
        self._findings += cluster.untold_findings(self._cluster, self._scene.version, self._settings)

    def _versions(self) -> list[Version]:
        """Of all nodes where they are told, else of the one that this client is connected to."""
        told = [node.version for node in self._scene.nodes or () if node.version is not None]
        return told or ([self._scene.version] if self._scene.version is not None else [])


def _elsewhere(topic: str, settings: RabbitmqSettings) -> Finding:
    why = "What is told of another cluster says nothing about this one; AMQP was asked what it can tell."
    fix = "Set 'management_url' to the management API of the cluster that the messages go to."
    found = f"it knows no such topic, at {settings.management}"
    return Finding(Severity.UNSEEN, f"topic {topic}", "management API", found, "that of this cluster", why, fix)
