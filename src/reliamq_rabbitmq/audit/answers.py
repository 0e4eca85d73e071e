"""What the management API tells of queues, exchanges, bindings, policies and nodes, as far as an audit asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["Alarm", "Binding", "Exchange", "Node", "Policy", "Queue", "Version"]

Json = Mapping[str, Any]
Version = tuple[int, ...]
"""Such as (3, 10, 8)."""


@dataclass(frozen=True, slots=True)
class Queue:
    """kind: ``quorum``, ``classic``, ``stream``.  policy: the name of the one in effect, of those that users set.

    members, online, leader: names of nodes; None where it was not told.
    """

    name: str
    kind: str = "quorum"
    durable: bool = True
    auto_delete: bool = False
    exclusive: bool = False
    arguments: Mapping[str, Any] | None = None
    policy: str | None = None
    members: frozenset[str] | None = None
    online: frozenset[str] | None = None
    leader: str | None = None

    @classmethod
    def read(cls, told: Json) -> Self:
        """Raises KeyError, TypeError for something else than a queue."""
        return cls(
            name=told["name"],
            kind=told["type"],
            durable=told["durable"],
            auto_delete=told["auto_delete"],
            exclusive=bool(told.get("exclusive")),
            arguments=told["arguments"],
            policy=told.get("policy") or None,
            members=frozenset(told["members"]) if told.get("members") else None,
            online=frozenset(told["online"]) if told.get("online") is not None else None,
            leader=told.get("leader") or None,
        )

    def argument(self, key: str) -> Any:
        """What it was declared with; key: as in a policy."""
        return (self.arguments or {}).get(f"x-{key}")


@dataclass(frozen=True, slots=True)
class Exchange:
    """policy: the name of the one in effect."""

    name: str
    kind: str = "fanout"
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False
    alternate: str | None = None
    policy: str | None = None

    @classmethod
    def read(cls, told: Json) -> Self:
        """Raises KeyError, TypeError for something else than an exchange."""
        return cls(
            name=told["name"],
            kind=told["type"],
            durable=told["durable"],
            auto_delete=told["auto_delete"],
            internal=told["internal"],
            alternate=told["arguments"].get("alternate-exchange"),
            policy=told.get("policy") or None,
        )


@dataclass(frozen=True, slots=True)
class Binding:
    """to_exchange: else to a queue."""

    destination: str
    to_exchange: bool
    routing_key: str = ""

    @classmethod
    def read(cls, told: Json) -> Self:
        """Raises KeyError for something else than a binding."""
        return cls(told["destination"], told["destination_type"] == "exchange", told["routing_key"])


@dataclass(frozen=True, slots=True)
class Policy:
    """operator: it is the operators', and in effect besides the one that users set."""

    name: str
    pattern: str
    definition: Mapping[str, Any]
    applies_to: str = "all"
    priority: int = 0
    operator: bool = False

    @classmethod
    def read(cls, told: Json, *, operator: bool) -> Self:
        """Raises KeyError for something else than a policy."""
        return cls(
            told["name"], told["pattern"], told["definition"], told["apply-to"], told.get("priority") or 0, operator
        )

    def __str__(self) -> str:
        return f"{'operator policy' if self.operator else 'policy'} '{self.name}'"


@dataclass(frozen=True, slots=True)
class Node:
    """Numbers are bytes; None where it was not told, as of a node that does not run.

    version: of RabbitMQ.  partitions: nodes that it has lost sight of.
    """

    name: str
    running: bool = True
    in_memory: bool = False
    version: Version | None = None
    partitions: tuple[str, ...] = ()
    memory_used: int | None = None
    memory_limit: int | None = None
    disk_free: int | None = None
    disk_limit: int | None = None

    @classmethod
    def read(cls, told: Json) -> Self:
        """Raises KeyError for something else than a node."""
        versions = {one.get("name"): one.get("version") for one in told.get("applications") or ()}
        return cls(
            name=told["name"],
            running=told["running"],
            in_memory=told.get("type") == "ram",
            version=_version(versions.get("rabbit")),
            partitions=tuple(told.get("partitions") or ()),
            memory_used=_number(told.get("mem_used")),
            memory_limit=_number(told.get("mem_limit")),
            disk_free=_number(told.get("disk_free")),
            disk_limit=_number(told.get("disk_free_limit")),
        )


@dataclass(frozen=True, slots=True)
class Alarm:
    """resource: ``memory`` or ``disk``."""

    node: str
    resource: str

    @classmethod
    def read(cls, told: Json) -> Self:
        """Raises KeyError for something else than an alarm."""
        return cls(told["node"], told["resource"])


def _version(text: object) -> Version | None:
    """``4.0.7-rc.1`` as 4, 0, 7; None for what is none."""
    found = re.match(r"\d+(\.\d+)*", str(text))
    return tuple(int(part) for part in found[0].split(".")) if found else None


def _number(told: object) -> int | None:
    """A node that cannot measure tells a word instead."""
    return told if isinstance(told, int) else None
