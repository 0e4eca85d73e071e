"""What the management API alone can tell, said thing by thing where it did not: never a pass."""

from __future__ import annotations

from enum import Enum

from reliamq.spi import Finding, Severity
from reliamq_rabbitmq.audit.management import ManagementError

__all__ = ["Thing", "unseen"]


class Thing(Enum):
    """What, the least that is safe, and how messages get lost by it."""

    MEMBERS = (
        "members of queues",
        "3 of each, online",
        "With one member the only copy of a message is lost with its node; without a majority nothing goes on.",
    )
    LEADERS = (
        "leaders of queues",
        "on several nodes",
        "When one node has them all, all lanes wait for new ones when it goes away.",
    )
    POLICIES = (
        "policies",
        "none that remove messages",
        "A policy can remove messages that nobody has handled (message-ttl, expires, max-length, delivery-limit).",
    )
    BINDINGS = (
        "bindings",
        "every group to its topic, every lane to its group",
        "What is not bound gets nothing, and messages are confirmed without it where another group gets them.",
    )
    NODES = (
        "nodes",
        "3, all running, no partitions",
        "With fewer than three either the only copy of a message can be lost, or one node away stops publishing.",
    )
    WATERMARKS = (
        "disk and memory limits",
        "at least 1 GB of disk, memory below its limit",
        "A disk that fills up before its alarm is raised takes the node down while it writes.",
    )
    ALARMS = (
        "alarms",
        "none in effect",
        "While one is in effect, every publisher waits, and then fails as unconfirmed.",
    )
    STREAM_QUEUE = (
        "feature flag stream_queue",
        "enabled",
        "Without it what has waited for a late retry is handed on without a confirm.",
    )

    def __init__(self, words: str, required: str, why: str) -> None:
        self.words, self.required, self.why = words, required, why


def unseen(subject: str, thing: Thing, error: ManagementError) -> Finding:
    """error: why it could not be seen."""
    found = f"not seen ({error.detail})"
    return Finding(Severity.UNSEEN, subject, thing.words, found, thing.required, thing.why, error.fix)
