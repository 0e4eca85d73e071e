"""The audit: every question about what keeps messages safe, put to the live servers (S2).

It promises to change nothing, and that what could not be read is a finding of its own and never a pass.  What the
answers mean is decided in ``server``, ``copies``, ``sentinels``, ``cluster``, ``topic`` and ``groups``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from reliamq.spi import Durability, Finding, Severity, TopicSpec
from reliamq_redis.audit import cluster, copies
from reliamq_redis.audit.answers import Server, name_of
from reliamq_redis.audit.commands import Commands
from reliamq_redis.audit.copies import Copies
from reliamq_redis.audit.lanes import look_at_key
from reliamq_redis.audit.questions import Questions, ask_server, unseen
from reliamq_redis.audit.rules import Fault, findings_of
from reliamq_redis.audit.sentinels import Sentinels, ask_sentinels
from reliamq_redis.audit.server import primary_faults, replica_faults
from reliamq_redis.audit.topic import audit_topic, odd_key_findings
from reliamq_redis.catalog.dead_letters import ORDER
from reliamq_redis.settings import Deployment, RedisSettings
from reliamq_redis.wire.errors import FAILURES, said
from reliamq_redis.wire.servers import Address, Servers

__all__ = ["audit"]

PAUSE_SECONDS = 0.5


async def audit(servers: Servers, settings: RedisSettings, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
    """Everything there is to say about the servers, these topics, their groups, and this client.

    Without topics they are judged as servers for replicated ones.  Raises BrokerUnavailable, and the client's errors.
    """
    findings = await _Audit(servers, settings, topics).everything()
    if any(finding.severity is Severity.LOSES for finding in findings):
        # Somebody may be declaring at this moment, or a replica that was away be coming back
        await asyncio.sleep(PAUSE_SECONDS)
        servers.forget()
        findings = await _Audit(servers, settings, topics).everything()
    return findings


class _Audit:
    """Questions, and the findings so far."""

    def __init__(self, servers: Servers, settings: RedisSettings, topics: Sequence[TopicSpec]) -> None:
        self._servers, self._settings, self._topics = servers, settings, topics
        self._commands = Commands(settings)
        self._durability = max((spec.durability for spec in topics), default=Durability.REPLICATED)
        self._subject = f"servers {settings.url}"
        self._findings: list[Finding] = []
        self._sentinels = Sentinels()
        self._nodes: list[cluster.Node] | None = None

    async def everything(self) -> list[Finding]:
        told = await self._ask(await self._servers.holders())
        primaries = [server for server in told if isinstance(server, Server)]
        for error in told:
            if isinstance(error, BaseException):
                raise error
        await self._deployment(primaries)
        await self._servers_alone(primaries)
        first = primaries[0].address
        for spec in self._topics:
            questions = Questions(self._servers, self._settings)
            self._findings += await audit_topic(questions, self._settings, spec, first)
        await self._dead_letters(first)
        self._findings += copies.client_findings(self._settings, self._durability)
        return self._findings

    # --- who there is ----------------------------------------------------------------------------------------------

    async def _deployment(self, primaries: list[Server]) -> None:
        if self._settings.deployment is Deployment.SENTINEL:
            self._sentinels = await ask_sentinels(self._settings)
            self._findings += self._sentinels.findings(self._settings, primaries[0].address)
        if self._settings.deployment is Deployment.CLUSTER:
            await self._cluster(primaries)

    async def _cluster(self, primaries: list[Server]) -> None:
        told, questions = dict[str, dict[str, str]](), Questions(self._servers, self._settings)
        for server in primaries:
            info, nodes = await cluster.ask_node(questions, server)
            self._nodes = nodes if nodes is not None else self._nodes
            if info is not None:
                told[server.name] = dict(info)
        self._findings += cluster.cluster_findings(self._subject, told, self._nodes, primaries, self._commands)
        self._findings += unseen(self._subject, questions, primaries[0].address, self._commands)

    def _known_replicas(self, primary: Server) -> frozenset[Address]:
        """There or not, as far as somebody tells."""
        connected = frozenset(replica.address for replica in primary.replicas)
        told = self._sentinels.replicas | cluster.replicas_of(primary.address, self._nodes or [])
        return copies.known_replicas(connected, told - {primary.address})

    # --- each of them ----------------------------------------------------------------------------------------------

    async def _servers_alone(self, primaries: list[Server]) -> None:
        all_of_them = [await self._copies(server) for server in primaries]
        replicas = [server for one in all_of_them for server in one.seen.values()]
        self._findings += findings_of("server", self._primary_faults(all_of_them))
        self._findings += findings_of("replica", self._replica_faults(replicas))
        self._findings += copies.spread_findings(self._subject, all_of_them, self._settings, self._durability)

    def _primary_faults(self, all_of_them: list[Copies]) -> Iterator[tuple[str, Fault]]:
        for one in all_of_them:
            for fault in primary_faults(one.primary, self._durability, self._commands):
                yield one.primary.name, fault
            for fault in copies.copies_faults(one, self._settings, self._durability, self._commands):
                yield one.primary.name, fault

    def _replica_faults(self, replicas: list[Server]) -> Iterator[tuple[str, Fault]]:
        for server in replicas:
            for fault in replica_faults(server, self._durability, self._commands):
                yield server.name, fault

    async def _copies(self, primary: Server) -> Copies:
        """Ask the replicas, too.  One that does not answer is said."""
        known, seen = sorted(self._known_replicas(primary)), dict[Address, Server]()
        for address, told in zip(known, await self._ask(known), strict=True):
            if isinstance(told, Server):
                seen[address] = told
            elif isinstance(told, FAILURES):
                self._findings.append(_silent(address, told))
            else:
                raise told
        return Copies(primary, frozenset(known), seen)

    async def _ask(self, addresses: Sequence[Address]) -> Sequence[Server | BaseException]:
        """All at once, so that those that are silent cost the time of one."""
        asking = [ask_server(self._servers, self._settings, address) for address in addresses]
        return await asyncio.gather(*asking, return_exceptions=True)

    async def _dead_letters(self, address: Address) -> None:
        """Of all topics: as long as they are nobody's, they are kept."""
        questions, subject = Questions(self._servers, self._settings), "dead letters"
        odd = await look_at_key(questions, ORDER, "zset")
        self._findings += odd_key_findings(subject, [odd] if odd else [], address, self._commands)
        self._findings += unseen(subject, questions, address, self._commands)


def _silent(address: Address, error: BaseException) -> Finding:
    found = f"not seen ({said(error)})"
    why = "Whether it keeps on its disk what it confirms, and would keep it as primary, is not known."
    fix = "Let this client reach it at the address that its primary tells (replica-announce-ip), as the same user."
    required = "readable"
    return Finding(Severity.UNSEEN, f"replica {name_of(address)}", "settings", found, required, why, fix)
