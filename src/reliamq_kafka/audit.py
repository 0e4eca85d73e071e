"""What the live cluster says about itself, as findings (S2).  Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from reliamq.spi import Finding, Severity, TopicSpec
from reliamq_kafka.admin import Admin
from reliamq_kafka.consumers import bounded
from reliamq_kafka.expectations import is_replicated
from reliamq_kafka.settings import KafkaSettings

__all__ = ["audit"]


async def audit(admin: Admin, settings: KafkaSettings, topics: Sequence[TopicSpec]) -> Sequence[Finding]:
    """Topics that are missing, and durability that a cluster so small cannot give.  Raises BrokerUnavailable."""
    findings = []
    async with bounded(settings, "auditing"):
        brokers = len(await admin.brokers())
        for spec in topics:
            if await admin.partitions(spec.name) is None:
                findings.append(_missing(spec))
            if is_replicated(spec) and brokers < 3:
                findings.append(_too_few(spec, brokers))
    return findings


def _missing(spec: TopicSpec) -> Finding:
    why, fix = (
        "Publishing to it is rejected as unroutable.",
        "Start the application once, or call 'await app.declare()'.",
    )
    return Finding(Severity.LOSES, f"topic {spec.name}", "topic", "missing", "declared", why, fix)


def _too_few(spec: TopicSpec, brokers: int) -> Finding:
    why, fix = "Messages are lost with a machine's disk.", "Use a cluster of three brokers, or require 'development'."
    asked = spec.durability.name.lower()
    return Finding(Severity.LOSES, f"topic {spec.name}", "durability", f"{brokers} brokers", asked, why, fix, "P1")
