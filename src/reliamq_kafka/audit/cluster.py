"""What brokers, Kafka's own topics and this client say about their safety: pure functions of what was answered."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from reliamq.spi import Durability, Finding, Severity
from reliamq_kafka.audit.commands import Commands
from reliamq_kafka.audit.rules import Rule, at_least, is_not, weighed
from reliamq_kafka.audit.topic import REPLICAS
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Broker
from reliamq_kafka.wire.consumers import SAFE_READING
from reliamq_kafka.wire.producers import SAFE_SENDING

__all__ = [
    "KAFKAS_TOPICS",
    "OFFSETS_TOPIC",
    "TRANSACTIONS_TOPIC",
    "client_findings",
    "cluster_findings",
    "setting_findings",
    "setting_rules",
]

BrokerValues = Mapping[int, Mapping[str, str | None]]
"""Settings by the broker's number."""
OFFSETS_TOPIC, TRANSACTIONS_TOPIC = "__consumer_offsets", "__transaction_state"
KAFKAS_TOPICS = {
    OFFSETS_TOPIC: "offsets.topic.replication.factor",
    TRANSACTIONS_TOPIC: "transaction.state.log.replication.factor",
}
"""Kafka's own topics, and by which setting a new one is made."""
WEEK_MINUTES = 7 * 24 * 60
REQUEST_OVERHEAD_BYTES = 64 * 1024
DEFAULT_REQUEST_BYTES = 100 * 1024 * 1024

RULES = (
    Rule(
        "unclean.leader.election.enable",
        is_not("true"),
        "false",
        Severity.LOSES,
        "A replica that lags behind may become a leader, and what it does not have is lost; the groups' positions too.",
        "unclean.leader.election.enable=false",
    ),
    Rule(
        "auto.create.topics.enable",
        is_not("true"),
        "false",
        Severity.RISKS,
        "A topic that is misspelt, or deleted while in use, comes to life with the defaults and without groups.",
        "auto.create.topics.enable=false",
    ),
    Rule(
        "offsets.retention.minutes",
        at_least(WEEK_MINUTES),
        f"at least {WEEK_MINUTES} (7 days)",
        Severity.RISKS,
        "The position of a group that was away for longer is forgotten: it starts over, or skips what it has not read.",
        f"offsets.retention.minutes={WEEK_MINUTES}",
    ),
    Rule(
        "offset.metadata.max.bytes",
        at_least(4096),
        "at least 4096",
        Severity.RISKS,
        "reliamq keeps attempts of unfinished messages there; what does not fit is not counted over crashes.",
        "offset.metadata.max.bytes=4096",
    ),
    Rule(
        "default.replication.factor",
        at_least(REPLICAS),
        f"at least {REPLICAS}",
        Severity.NOTE,
        "Topics made by others are less safe; reliamq says itself how many replicas it wants.",
        f"default.replication.factor={REPLICAS}",
    ),
    Rule(
        "min.insync.replicas",
        at_least(2),
        "at least 2",
        Severity.NOTE,
        "Topics made by others are less safe, and so are the groups' positions; reliamq sets it on its own topics.",
        "min.insync.replicas=2",
    ),
)
CHANGED_WHILE_RUNNING = frozenset({"unclean.leader.election.enable", "min.insync.replicas"})


def _replication_rule(setting: str, exists: bool) -> Rule:
    """The setting by which Kafka makes a topic of its own.  exists: it has made it, and what it really is counts."""
    why = "The positions of all groups will be kept by too few brokers: lost with them, groups start over or skip."
    if exists:
        why = "It acts when the topic is made; what the topic is now was looked at by itself."
    severity = Severity.NOTE if exists else Severity.LOSES
    return Rule(setting, at_least(REPLICAS), f"at least {REPLICAS}", severity, why, f"{setting}={REPLICAS}")


def cluster_findings(
    subject: str, brokers: Sequence[Broker], durability: Durability, *, away: Collection[int] = ()
) -> Iterator[Finding]:
    """How many brokers there are, and whether they say where they are.

    away: brokers that have replicas and are not there.  They count: that a copy lacks now is said of its topic, and a
    cluster that has lost one of three must not keep an application from starting, which would stop what still runs.
    """
    count = len(brokers) + len(away)
    if count < REPLICAS:
        why = "With fewer, either the only copy of a message can be lost, or one broker away stops publishing."
        fix = "Add brokers, or require only 'development' where messages may be lost."
        severity = weighed(Severity.LOSES, durability)
        yield Finding(severity, subject, "brokers", str(count), f"at least {REPLICAS}", why, fix)
    nowhere = [str(broker.number) for broker in brokers if broker.rack is None]
    if nowhere and len(brokers) > 1:
        # No proof of harm, as all on one rack is: without racks nobody can tell, Kafka least of all.
        found = "not configured" if len(nowhere) == len(brokers) else f"not configured on broker {', '.join(nowhere)}"
        why = "Kafka cannot spread replicas over racks it does not know, and one power cut may take all of them."
        fix = "Set broker.rack in each broker's server.properties (its zone, rack or host), restart them one by one."
        yield Finding(weighed(Severity.RISKS, durability), subject, "broker.rack", found, "set on each", why, fix)


def setting_rules(largest_batch: int, own_topics: Mapping[str, bool]) -> tuple[Rule, ...]:
    """largest_batch: the largest max.message.bytes of the topics.  own_topics: Kafka's own, and whether they exist."""
    own = (_replication_rule(KAFKAS_TOPICS[name], exists) for name, exists in own_topics.items())
    return (*RULES, _request_rule(largest_batch), *own)


def setting_findings(
    values: BrokerValues, rules: Sequence[Rule], durability: Durability, commands: Commands
) -> Iterator[Finding]:
    """Brokers' settings, one finding for all that have the same value."""
    for rule in rules:
        for found in sorted({told for each in values.values() if (told := each.get(rule.setting)) is not None}):
            those = [number for number, each in values.items() if each.get(rule.setting) == found]
            subject = f"broker{'s' if len(those) > 1 else ''} {', '.join(map(str, sorted(those)))}"
            finding = rule.judge({rule.setting: found}, subject, durability, _fix(rule, commands))
            if finding:
                yield finding
    yield from _controller_findings(values, durability, commands)
    yield from _untold_findings(values, rules, commands)


def _request_rule(largest_batch: int) -> Rule:
    # Followers' fetch sizes are no limits since Kafka 0.10.1: a larger batch is copied all the same.
    least = largest_batch + REQUEST_OVERHEAD_BYTES
    return Rule(
        "socket.request.max.bytes",
        at_least(least),
        f"at least {least}",
        Severity.RISKS,
        "A batch that the topic allows is cut off with its connection, and stays in doubt for ever.",
        f"socket.request.max.bytes={max(least, DEFAULT_REQUEST_BYTES)}",
    )


def _fix(rule: Rule, commands: Commands) -> str:
    if rule.setting in CHANGED_WHILE_RUNNING:
        return commands.set_on_brokers(rule.change)
    return f"{rule.change} in each broker's server.properties, and restart them one by one."


def _controller_findings(values: BrokerValues, durability: Durability, commands: Commands) -> Iterator[Finding]:
    """The controllers keep which topics there are: with them everything is gone."""
    voters = {told for each in values.values() if (told := each.get("controller.quorum.voters"))}
    subject, setting, required = "cluster's controllers", "controller.quorum.voters", f"at least {REPLICAS}"
    if not voters:
        why = "The controllers know which topics there are; how many they are is not in the brokers' settings."
        fix = f"Look yourself: {commands.describe_quorum()}"
        yield Finding(Severity.UNSEEN, subject, setting, "not told", required, why, fix)
        return
    fewest = min(len(told.split(",")) for told in voters)
    if fewest < REPLICAS:
        severity = weighed(Severity.LOSES if fewest == 1 else Severity.RISKS, durability)
        why = "Which topics there are is known to the controllers alone: lost with their disk, all messages are."
        yield Finding(
            severity, subject, setting, str(fewest), required, why, "Run three controllers on three machines."
        )


def _untold_findings(values: BrokerValues, rules: Sequence[Rule], commands: Commands) -> Iterator[Finding]:
    """Settings that a broker keeps to itself, as hosted ones do."""
    untold = {rule.setting for rule in rules for each in values.values() if each.get(rule.setting) is None}
    if untold:
        why = "What cannot be read is not known to be safe."
        fix = f"Ask who runs it, or: {commands.allow('DescribeConfigs', '--cluster')}"
        found = f"not told: {', '.join(sorted(untold))}"
        yield Finding(Severity.UNSEEN, "brokers", "settings", found, "readable", why, fix)


def client_findings(settings: KafkaSettings) -> Iterator[Finding]:
    """What this client does by itself, from the constants that it uses."""
    subject = "this client"
    early = "Confirmations come before the replicas have the message, or its retries double and reorder."
    skipped = "What was handed out and not handled yet, or what was there before the group, is skipped."
    aborted = "What a transaction of another program took back is handled as if it had happened."
    for used, name, required, why in (
        (SAFE_SENDING, "acks", "all", early),
        (SAFE_SENDING, "enable_idempotence", True, early),
        (SAFE_READING, "enable_auto_commit", False, skipped),
        (SAFE_READING, "auto_offset_reset", "earliest", skipped),
        (SAFE_READING, "isolation_level", "read_committed", aborted),
    ):
        if used.get(name) != required:
            fix = "Put it right in reliamq_kafka.wire; it is no setting."
            yield Finding(Severity.LOSES, subject, name, str(used.get(name)), str(required), why, fix)
    if settings.username is not None and not settings.tls:
        why = "Who listens on the network reads user, password and messages, and can publish and settle in their name."
        yield Finding(Severity.NOTE, subject, "tls", "off", "on where there is a password", why, "Use kafkas://.")
