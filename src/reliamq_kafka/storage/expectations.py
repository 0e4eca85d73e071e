"""What a topic must be like on Kafka: what it is created with, and what is said when it is there otherwise.

What of it can lose messages is judged by the audit's rules, so that declaring and auditing say the same in the same
words; here is what was asked besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

from reliamq.spi import Durability, Finding, Severity, TopicSpec
from reliamq_kafka.audit import topic as topics
from reliamq_kafka.audit.commands import Commands
from reliamq_kafka.catalog.own_topics import KEPT, LOG, copies
from reliamq_kafka.catalog.topics import OVERHEAD_BYTES
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Broker, Partition

__all__ = ["differences", "is_replicated", "retention_difference", "topic_configs"]

NOT_LOWERED = "It was declared with more before, and declaring never lowers; nothing is lost."
ALIKE = "Declare it with what every user of it needs."


def is_replicated(spec: TopicSpec) -> bool:
    """Whether its confirmations must survive a machine."""
    return spec.durability > Durability.DEVELOPMENT


def topic_configs(spec: TopicSpec, settings: KafkaSettings, replicas: int) -> dict[str, str]:
    """What it is created with, on so many replicas."""
    largest = str(spec.max_message_bytes + OVERHEAD_BYTES)
    return {"cleanup.policy": LOG, **KEPT, **copies(settings, replicas), "max.message.bytes": largest}


def differences(
    spec: TopicSpec,
    settings: KafkaSettings,
    partitions: Sequence[Partition],
    brokers: Sequence[Broker],
    live: Mapping[str, str],
) -> Iterator[Finding]:
    """What of a topic that is there is otherwise than asked.  live: its effective settings."""
    commands, least = Commands(settings), int(live.get("min.insync.replicas") or settings.min_insync_replicas)
    yield from topics.setting_findings(spec, live, settings, commands)
    yield from topics.partition_findings(spec.name, partitions, brokers, least, spec.durability, commands)
    yield from _shape_findings(spec, settings, partitions, live)


def _shape_findings(
    spec: TopicSpec, settings: KafkaSettings, partitions: Sequence[Partition], live: Mapping[str, str]
) -> Iterator[Finding]:
    """What loses nothing, and is not as asked."""
    subject = f"topic {spec.name}"
    limit = int(live.get("max.message.bytes") or 0) - OVERHEAD_BYTES
    if limit > spec.max_message_bytes:
        asked = str(spec.max_message_bytes)
        yield Finding(Severity.NOTE, subject, "max_message_bytes", str(limit), asked, NOT_LOWERED, ALIKE, "S1")
    replicas = min(len(part.replicas) for part in partitions)
    if is_replicated(spec) and topics.REPLICAS <= replicas < settings.replication_factor:
        why, fix = "It can spare one broker fewer.", "Give its partitions more replicas: kafka-reassign-partitions.sh."
        asked = str(settings.replication_factor)
        yield Finding(Severity.RISKS, subject, "replication_factor", str(replicas), asked, why, fix, "S1")
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
