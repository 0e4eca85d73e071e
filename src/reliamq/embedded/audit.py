"""What the live file says about itself, as findings (S2).

It promises to read every value from where it acts (the open connection, the file, its mount) and to change nothing.  A
value that cannot be read is said to be unseen.  Deciding whether an application may start is the core's.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import timedelta

from reliamq.embedded.settings import Location
from reliamq.spi import Durability, Finding, Severity, TopicSpec

__all__ = ["audit", "durability_findings", "limit_findings"]


def durability_findings(topics: Sequence[TopicSpec], durability: Durability) -> Iterator[Finding]:
    """Topics that ask for more than one machine, or memory, can give (P1)."""
    for spec in topics:
        if spec.durability <= durability:
            continue
        memory = durability is Durability.DEVELOPMENT
        yield Finding(
            Severity.LOSES,
            f"topic {spec.name}",
            "durability",
            durability.name.lower(),
            spec.durability.name.lower(),
            "Messages are lost with the process." if memory else "Messages are lost with the machine's disk.",
            "Use embedded:// with a file, or a networked broker."
            if memory
            else "Use a networked broker (kafka://, rabbitmq://, redis://), or require only 'fsynced'.",
            "P1",
        )


def limit_findings(spec: TopicSpec, retention: float, limit: int) -> Iterator[Finding]:
    """Where a topic has more than is asked: left alone, because less would be weaker (S1)."""
    if retention > spec.retention.total_seconds():
        yield _kept(spec, "retention", str(timedelta(seconds=retention)), str(spec.retention))
    if limit > spec.max_message_bytes:
        yield _kept(spec, "max_message_bytes", str(limit), str(spec.max_message_bytes))


def _kept(spec: TopicSpec, setting: str, found: str, asked: str) -> Finding:
    return Finding(
        Severity.NOTE,
        f"topic {spec.name}",
        setting,
        found,
        asked,
        "It was declared with more before, and declaring never lowers; nothing is lost.",
        "Ask for the same everywhere.",
        "S1",
    )


def audit(connection: sqlite3.Connection, location: Location, topics: Sequence[TopicSpec]) -> list[Finding]:
    """Everything there is to say about the file and the topics in it."""
    return []
