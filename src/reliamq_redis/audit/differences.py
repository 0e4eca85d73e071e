"""What a topic was declared with, against what is asked of it: said by whoever declares and whoever audits."""

from __future__ import annotations

from collections.abc import Iterator

from reliamq.spi import Finding, Severity
from reliamq_redis.catalog.topics import TopicFacts

__all__ = ["differences"]

NOT_LOWERED = "It was declared with more before, and declaring never lowers; nothing is lost."
LESS = "It was declared with less before, and stays so for everybody."
ALIKE = "Declare it with what every user of it needs."
DECLARE_ANEW = "Drain the topic, delete its key, and declare it again."


def differences(topic: str, facts: TopicFacts, asked: TopicFacts) -> Iterator[Finding]:
    """What was declared otherwise before."""
    pairs = (
        ("max_message_bytes", facts.max_message_bytes, asked.max_message_bytes, "What is larger is rejected."),
        ("retention", facts.retention_seconds, asked.retention_seconds, "A group that is new gets less of the past."),
        ("durability", facts.durability, asked.durability, "A confirmation promises less."),
    )
    for setting, found, wanted, less in pairs:
        if found != wanted:
            severity = Severity.RISKS if found < wanted else Severity.NOTE
            why, fix = (f"{LESS} {less}", DECLARE_ANEW) if found < wanted else (NOT_LOWERED, ALIKE)
            yield Finding(severity, f"topic {topic}", setting, _shown(found), _shown(wanted), why, fix, "S1")
    if facts.lanes != asked.lanes:
        why = "So many workers of a group can share the topic; nothing is lost."
        fix = "Ask for what is there: lanes that are added put keys out of order."
        yield Finding(Severity.NOTE, f"topic {topic}", "lanes", str(facts.lanes), str(asked.lanes), why, fix, "S1")


def _shown(value: object) -> str:
    return getattr(value, "name", str(value)).lower()
