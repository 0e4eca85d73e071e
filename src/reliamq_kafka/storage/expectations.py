"""What a topic must be like on Kafka: what it is created with, and what is said when it is there otherwise.

One list serves both, so that nothing is created which would be complained about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from reliamq.spi import Durability, Finding, Severity, TopicSpec
from reliamq_kafka.catalog.own_topics import TABLE, copies
from reliamq_kafka.catalog.topics import OVERHEAD_BYTES
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Partition

__all__ = ["differences", "is_replicated", "retention_difference", "table_differences", "topic_configs"]

REQUIRED = (
    (
        "cleanup.policy",
        "delete",
        Severity.LOSES,
        "Compaction removes a message as soon as a later one has its key.",
    ),
    (
        "retention.ms",
        "-1",
        Severity.RISKS,  # an audit says when a group's backlog comes close to it
        "Kafka removes what is older, also what a group has not finished; reliamq trims the topic by itself.",
    ),
    (
        "retention.bytes",
        "-1",
        Severity.RISKS,
        "Kafka removes what is beyond it, also what a group has not finished; reliamq trims the topic by itself.",
    ),
    (
        "message.timestamp.type",
        "LogAppendTime",
        Severity.NOTE,
        "How long a message is kept goes by the clock of who published it.",
    ),
)
UNCLEAN = "unclean.leader.election.enable"
NOT_RAISED = "Messages that are larger are rejected; none that was confirmed is lost."
NOT_LOWERED = "It was declared with more before, and declaring never lowers; nothing is lost."
ALIKE = "Declare it with what every user of it needs."


def is_replicated(spec: TopicSpec) -> bool:
    """Whether its confirmations must survive a machine."""
    return spec.durability > Durability.DEVELOPMENT


def topic_configs(spec: TopicSpec, settings: KafkaSettings, replicas: int) -> dict[str, str]:
    """What it is created with, on so many replicas."""
    return {
        **{setting: value for setting, value, _, _ in REQUIRED},
        **copies(settings, replicas),
        "max.message.bytes": str(spec.max_message_bytes + OVERHEAD_BYTES),
    }


def differences(
    spec: TopicSpec, settings: KafkaSettings, partitions: Sequence[Partition], live: Mapping[str, str]
) -> Iterator[Finding]:
    """What of a topic that is there is otherwise than asked.  live: its effective settings."""
    subject = f"topic {spec.name}"
    for setting, value, severity, why in REQUIRED:
        if live.get(setting) != value:
            yield _changed(subject, setting, live.get(setting, "unknown"), value, severity, why)
    if is_replicated(spec):
        yield from _replica_findings(subject, settings, partitions, live)
    yield from _size_findings(spec, subject, settings, partitions, live)


def table_differences(
    name: str, settings: KafkaSettings, partitions: Sequence[Partition], live: Mapping[str, str]
) -> Iterator[Finding]:
    """Where one of reliamq's own tables is less safe than the topics that need it."""
    subject = f"topic {name}"
    if live.get("cleanup.policy") != TABLE:
        why = "Kafka removes rows that still count."
        found = live.get("cleanup.policy", "unknown")
        yield _changed(subject, "cleanup.policy", found, TABLE, Severity.LOSES, why)
    yield from _replica_findings(subject, settings, partitions, live)


def _replica_findings(
    subject: str, settings: KafkaSettings, partitions: Sequence[Partition], live: Mapping[str, str]
) -> Iterator[Finding]:
    if live.get(UNCLEAN) != "false":
        why = "A replica that lacks confirmed messages may become the leader, and they are gone."
        yield _changed(subject, UNCLEAN, live.get(UNCLEAN, "unknown"), "false", Severity.LOSES, why)
    replicas = min(len(part.replicas) for part in partitions)
    in_sync = min(int(live["min.insync.replicas"]), replicas)  # Kafka takes no more of the setting than there are
    if replicas < settings.replication_factor:
        fix = "Give its partitions more replicas with kafka-reassign-partitions.sh."
        yield Finding(
            Severity.LOSES if replicas < 2 else Severity.RISKS,
            subject,
            "replication_factor",
            str(replicas),
            str(settings.replication_factor),
            "With one broker's disk its messages are lost." if replicas < 2 else "It can spare one broker fewer.",
            fix,
            "P1",
        )
    if in_sync < settings.min_insync_replicas:
        why = "A message is confirmed with fewer copies than asked for, and lost with them."
        severity = Severity.LOSES if in_sync < 2 else Severity.RISKS
        required = str(settings.min_insync_replicas)
        yield _changed(subject, "min.insync.replicas", str(in_sync), required, severity, why, "P1")


def _size_findings(
    spec: TopicSpec, subject: str, settings: KafkaSettings, partitions: Sequence[Partition], live: Mapping[str, str]
) -> Iterator[Finding]:
    limit = max(0, int(live["max.message.bytes"]) - OVERHEAD_BYTES)
    if limit != spec.max_message_bytes:
        why = NOT_LOWERED if limit > spec.max_message_bytes else NOT_RAISED
        fix = f"{ALIKE} On Kafka it is max.message.bytes, which is {OVERHEAD_BYTES} more."
        asked = str(spec.max_message_bytes)
        yield Finding(Severity.NOTE, subject, "max_message_bytes", str(limit), asked, why, fix, "S1")
    if len(partitions) != settings.partitions:
        why = "So many workers of a group can share it; nothing is lost."
        fix = "Ask for what is there: partitions that are added put keys out of order."
        found, asked = str(len(partitions)), str(settings.partitions)
        yield Finding(Severity.NOTE, subject, "partitions", found, asked, why, fix, "S1")


def retention_difference(spec: TopicSpec, retention: timedelta) -> Iterator[Finding]:
    """Where the topic keeps messages for longer than asked.  retention: the longest that was declared."""
    if retention > spec.retention:
        found, asked = str(retention), str(spec.retention)
        yield Finding(Severity.NOTE, f"topic {spec.name}", "retention", found, asked, NOT_LOWERED, ALIKE, "S1")


def _changed(
    subject: str, setting: str, found: str, required: str, severity: Severity, why: str, promise: str = "S1"
) -> Finding:
    topic = subject.removeprefix("topic ")
    fix = f"kafka-configs.sh --alter --topic {topic} --add-config {setting}={required}"
    return Finding(severity, subject, setting, found, required, why, fix, promise)
