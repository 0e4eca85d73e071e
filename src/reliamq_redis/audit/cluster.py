"""Whether the Cluster holds all its data, and can replace a node that fails: what its nodes tell, and what it means.

Source: Redis documentation, "Redis Cluster specification", "CLUSTER INFO", "CLUSTER NODES".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reliamq.spi import Finding, Severity
from reliamq_redis.audit.answers import Server, name_of
from reliamq_redis.audit.commands import Commands
from reliamq_redis.audit.questions import Questions
from reliamq_redis.audit.rules import Fault, findings_of, names_of
from reliamq_redis.wire.servers import Address

__all__ = ["Node", "ask_node", "cluster_findings", "read_info", "read_nodes", "replicas_of"]

SLOTS = 16_384
LEAST = 3
"""Primaries: two of them agree that the third is gone."""


@dataclass(frozen=True, slots=True)
class Node:
    """identity, primary: by which nodes know one another; primary: None of one that is no replica.

    flags: ``fail``: most say that it is gone; ``fail?``: whoever tells it says so.
    """

    identity: str
    address: Address
    flags: frozenset[str]
    primary: str | None

    @property
    def is_well(self) -> bool:
        """Whether nobody says that it is gone."""
        return not self.flags & {"fail", "fail?", "noaddr", "handshake"}


def read_nodes(answer: bytes) -> list[Node]:
    """The answer to ``CLUSTER NODES``: a line for each."""
    lines = [line.split() for line in answer.decode().splitlines() if line]
    return [
        Node(words[0], _address(words[1]), frozenset(words[2].split(",")), None if words[3] == "-" else words[3])
        for words in lines
    ]


def _address(text: str) -> Address:
    """``10.0.0.1:6379@16379,hostname``"""
    host, _, port = text.partition("@")[0].rpartition(":")
    return host, int(port)


def read_info(answer: bytes) -> Mapping[str, str]:
    """The answer to ``CLUSTER INFO``."""
    return dict(line.split(":", 1) for line in answer.decode().split("\r\n") if ":" in line)


def replicas_of(primary: Address, nodes: list[Node]) -> frozenset[Address]:
    """There or not."""
    identities = {node.identity for node in nodes if node.address == primary}
    return frozenset(node.address for node in nodes if node.primary in identities)


async def ask_node(questions: Questions, server: Server) -> tuple[Mapping[str, str] | None, list[Node] | None]:
    """What a node tells of the Cluster; None for what it refuses.  Raises the client's errors."""
    info: Any = await questions.of_server(server.address, "CLUSTER", "INFO")
    nodes: Any = await questions.of_server(server.address, "CLUSTER", "NODES")
    return None if info is None else read_info(info), None if nodes is None else read_nodes(nodes)


def cluster_findings(
    subject: str,
    told: Mapping[str, Mapping[str, str]],
    nodes: list[Node] | None,
    primaries: list[Server],
    commands: Commands,
) -> Iterator[Finding]:
    """told: ``CLUSTER INFO`` by the node's name.  nodes: None where they were not told."""
    faults = [(name, fault) for name, info in told.items() for fault in _info_faults(info, primaries[0], commands)]
    yield from findings_of("node", faults)
    yield from findings_of(
        "node", [(one.name, fault) for one in primaries for fault in _coverage_faults(one, commands)]
    )
    unwell = [name_of(node.address) for node in nodes or () if not node.is_well]
    if unwell:
        why = "One more that fails can leave a part of the data without anybody who holds it."
        fix = f"Start {names_of(unwell)}, or CLUSTER FORGET what is gone for good."
        yield Finding(Severity.RISKS, subject, "nodes", f"without {names_of(unwell)}", "all there", why, fix)


def _info_faults(info: Mapping[str, str], server: Server, commands: Commands) -> Iterator[Fault]:
    state, assigned = info.get("cluster_state"), int(info.get("cluster_slots_assigned", SLOTS))
    fix = f"Start the nodes that are away; {commands.run(server.address, 'CLUSTER', 'NODES')}"
    if state != "ok":
        why = "A part of the data has no server, or most primaries are away: nothing can be published or handled."
        yield Fault(Severity.LOSES, "cluster_state", str(state), "ok", why, fix, passing=True)
    failing = int(info.get("cluster_slots_fail", 0))  # those of nodes that are only suspected: see nodes
    if assigned < SLOTS or failing:
        why = "What is in those slots is out of reach, or lost with its server."
        mend = f"redis-cli --cluster fix {server.name}, once nobody can come back that has them."
        found = f"{assigned} assigned, {failing} of them failing"
        yield Fault(Severity.LOSES, "slots", found, f"{SLOTS}, none failing", why, f"{fix}; then {mend}", bool(failing))
    size = int(info.get("cluster_size", LEAST))
    if size < LEAST:
        why = "With fewer, one that is away leaves no majority, and no replica is ever made primary."
        yield Fault(Severity.RISKS, "primaries", str(size), f"at least {LEAST}", why, "Add primaries with replicas.")


def _coverage_faults(server: Server, commands: Commands) -> Iterator[Fault]:
    setting = "cluster-require-full-coverage"
    if server.told(setting) == "no":
        why = "With a part of the data away the rest goes on: some keys are published and handled, others wait."
        yield Fault(Severity.NOTE, setting, "no", "yes, or known", why, commands.set(server.address, setting, "yes"))
