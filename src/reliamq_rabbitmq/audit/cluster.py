"""What nodes, alarms, versions and this client say about safety: pure functions of what was answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from reliamq.spi import Durability, Finding, Severity, TopicSpec
from reliamq_rabbitmq.audit.answers import Alarm, Node, Version
from reliamq_rabbitmq.audit.commands import Commands
from reliamq_rabbitmq.audit.queues import MEMBERS
from reliamq_rabbitmq.audit.rules import names_of, weighed
from reliamq_rabbitmq.audit.unseen import Thing
from reliamq_rabbitmq.settings import RabbitmqSettings

__all__ = [
    "alarm_findings",
    "client_findings",
    "flag_findings",
    "node_findings",
    "size_findings",
    "untold_findings",
    "version_findings",
]

LEAST_DISK = 1_000_000_000
"""Twice as much as the log holds that all quorum queues of a node write to first."""
CLOSE = 0.9
"""Of a limit, from where it is nearly reached."""
FLAG = "stream_queue"
WITHOUT_FLAG = (3, 12)
"""Since that version it cannot be off."""
WITHOUT_PARTITIONS = (4, 3)
"""Since that version there is no choice of what a node does that has lost sight of others."""


@dataclass(frozen=True, slots=True)
class _Versions:
    """Versions below one, and what is known of them."""

    below: Version
    severity: Severity
    required: str
    why: str


UNTESTED = "reliamq is tested with 3.10 and later; before it no message of a quorum queue can wait for a time."
DIVERGING = "Logs of a quorum queue's members may diverge, which loses messages (rabbitmq-server#13326)."
UNMENDED = "The community mends this series no more: what is found in it stays."
KNOWN = (
    _Versions((3, 10), Severity.RISKS, "at least 3.10", UNTESTED),
    _Versions((4, 0), Severity.NOTE, "a series that is mended", UNMENDED),
    _Versions((4, 0, 7), Severity.RISKS, "at least 4.0.7", DIVERGING),
    _Versions((4, 2), Severity.NOTE, "a series that is mended", UNMENDED),
)
UPGRADE = "Upgrade the nodes one by one, as RabbitMQ's own guide says."


def node_findings(cluster: str, nodes: Sequence[Node], durability: Durability, commands: Commands) -> Iterator[Finding]:
    """How many nodes there are, and how each is.  Nodes that are away count: see what is said of the queues."""
    if len(nodes) < MEMBERS:
        why = "With fewer, either the only copy of a message can be lost, or one node away stops publishing."
        fix = "Add nodes (rabbitmqctl join_cluster), or require only 'development' where messages may be lost."
        severity = weighed(Severity.LOSES, durability)
        yield Finding(severity, cluster, "nodes", str(len(nodes)), f"at least {MEMBERS}", why, fix)
    away = [node.name for node in nodes if not node.running]
    if away:
        why = "When a further node fails, queues may be left without a majority: publishing and handling stop."
        fix, severity = f"Start {', '.join(away)}.", weighed(Severity.RISKS, durability)
        yield Finding(severity, cluster, "running nodes", f"without {', '.join(away)}", "all", why, fix)
    yield from _partition_findings(cluster, nodes)
    yield from _memory_node_findings(nodes)
    yield from _silent_findings(cluster, nodes)
    yield from _disk_findings(nodes, commands)
    yield from _close_findings(nodes)


def _partition_findings(cluster: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    parted = [f"{node.name} from {', '.join(node.partitions)}" for node in nodes if node.partitions]
    if parted:
        why = "What is declared now is known to one side alone and forgotten later: a new group misses its messages."
        fix = "Restart the nodes of the side that you trust less, one by one."
        found = "; ".join(parted)
        yield Finding(Severity.LOSES, cluster, "partitions", found, "none", why, fix, passing=True)


def _memory_node_findings(nodes: Sequence[Node]) -> Iterator[Finding]:
    in_memory = [node.name for node in nodes if node.in_memory]
    if in_memory:
        why = "It keeps which queues and bindings there are in its memory alone."
        fix = f"rabbitmqctl -n {in_memory[0]} change_cluster_node_type disc, while the node is stopped (stop_app)."
        yield Finding(Severity.RISKS, f"node {names_of(in_memory)}", "type", "ram", "disc", why, fix)


def _silent_findings(cluster: str, nodes: Sequence[Node]) -> Iterator[Finding]:
    """A node tells its limits some seconds after its start; never, where its statistics are switched off."""
    silent = [node.name for node in nodes if node.running and None in (node.disk_limit, node.memory_limit)]
    if silent:
        thing = Thing.WATERMARKS
        fix = f"Ask again in some seconds, or look yourself: rabbitmq-diagnostics -n {silent[0]} status"
        found = f"not told by {names_of(silent)}"
        yield Finding(Severity.UNSEEN, cluster, thing.words, found, thing.required, thing.why, fix)


def _disk_findings(nodes: Sequence[Node], commands: Commands) -> Iterator[Finding]:
    """One finding for all nodes that have the same limit."""
    names: dict[int, list[str]] = {}
    for node in nodes:
        if node.disk_limit is not None and node.disk_limit < LEAST_DISK:
            names.setdefault(node.disk_limit, []).append(node.name)
    for limit, alike in names.items():
        why = "A disk that fills up faster than the alarm is raised takes the node down while it writes its logs."
        now = commands.limit_disk(alike[0], "2GB")
        fix = f"disk_free_limit.absolute = 2GB in each rabbitmq.conf; until the next restart: {now}"
        subject, required = f"node {names_of(alike)}", f"at least {LEAST_DISK}"
        yield Finding(Severity.RISKS, subject, "disk_free_limit", str(limit), required, why, fix)


def _close_findings(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Alarms that are near; those in effect are told by themselves."""
    why = "At the limit an alarm makes every publisher of the cluster wait, and then fail as unconfirmed."
    for node in nodes:
        subject = f"node {node.name}"
        if node.memory_used and node.memory_limit and CLOSE * node.memory_limit < node.memory_used:
            found, fix = f"{node.memory_used} of {node.memory_limit}", "Let consumers catch up, or give it more memory."
            yield Finding(Severity.NOTE, subject, "memory used", found, f"below {CLOSE:.0%}", why, fix)
        if node.disk_free and node.disk_limit and CLOSE * node.disk_free < node.disk_limit:
            found, fix = f"{node.disk_free}, limit {node.disk_limit}", "Let consumers catch up, or give it more disk."
            yield Finding(Severity.NOTE, subject, "disk free", found, "well above the limit", why, fix)


def alarm_findings(alarms: Sequence[Alarm]) -> Iterator[Finding]:
    """Those in effect now."""
    for alarm in alarms:
        why = "Every publisher of the cluster waits until it is over, and then fails as unconfirmed."
        what = "memory: let consumers catch up, or raise its limit" if alarm.resource == "memory" else "disk: free some"
        fix = f"See what fills its {what}; rabbitmq-diagnostics -n {alarm.node} alarms"
        yield Finding(Severity.RISKS, f"node {alarm.node}", f"{alarm.resource} alarm", "in effect", "none", why, fix)


def version_findings(cluster: str, versions: Sequence[Version]) -> Iterator[Finding]:
    """versions: of the nodes, as far as they are known."""
    for version in sorted(set(versions)):
        known = next((one for one in KNOWN if version < one.below), None)
        if known is not None:
            found = ".".join(str(part) for part in version)
            yield Finding(known.severity, cluster, "version", found, known.required, known.why, UPGRADE)
    if len(set(versions)) > 1:
        found = ", ".join(".".join(str(part) for part in version) for version in sorted(set(versions)))
        why = "Nodes of several versions are meant for the time of an upgrade only."
        yield Finding(Severity.NOTE, cluster, "versions", found, "one", why, "Upgrade the other nodes.")


def size_findings(topics: Sequence[TopicSpec], largest: int) -> Iterator[Finding]:
    """largest: of messages that the broker takes unless it was set otherwise, which it tells nobody."""
    for spec in topics:
        if spec.max_message_bytes > largest:
            why = "Larger messages are refused, and the channel is closed; none that was confirmed is lost."
            fix = f"max_message_size = {spec.max_message_bytes} in each rabbitmq.conf, and restart them one by one."
            found, required = f"{largest} unless it was set", f"at least {spec.max_message_bytes}"
            yield Finding(Severity.NOTE, f"topic {spec.name}", "max_message_size", found, required, why, fix)


def flag_findings(cluster: str, enabled: bool) -> Iterator[Finding]:
    """enabled: whether RabbitMQ can hand on with a confirm what has waited."""
    if not enabled:
        why = "What has waited for a late retry is handed on without a confirm, and is lost where that fails."
        fix = f"rabbitmqctl enable_feature_flag {FLAG}"
        yield Finding(Severity.LOSES, cluster, f"feature flag {FLAG}", "disabled", "enabled", why, fix)


def untold_findings(cluster: str, version: Version | None, settings: RabbitmqSettings) -> Iterator[Finding]:
    """Settings of nodes that neither AMQP nor the management API tells."""
    milliseconds = int(settings.ack_timeout_seconds * 1000)
    why = "With a shorter one the broker takes back what slow handlers hold, by closing the channel: it comes again."
    fix = "Look yourself: rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).'"
    required = f"at least {milliseconds} ('ack_timeout_seconds')"
    yield Finding(Severity.UNSEEN, cluster, "consumer_timeout", "not told", required, why, fix)
    if version is None or version < WITHOUT_PARTITIONS:
        why = "Otherwise both sides of a broken network go on, and one's declared groups and bindings are forgotten."
        fix = "Look yourself: rabbitmqctl eval 'application:get_env(rabbit, cluster_partition_handling).'"
        setting = "cluster_partition_handling"
        yield Finding(Severity.UNSEEN, cluster, setting, "not told", "pause_minority", why, fix)


def client_findings(settings: RabbitmqSettings, durability: Durability) -> Iterator[Finding]:
    """What this client is set to."""
    subject = "this client"
    if settings.replicas < MEMBERS:
        why = "Queues that it declares are on one node alone: with its disk, what was confirmed is lost."
        severity = weighed(Severity.RISKS, durability)
        fix = f"Set 'replicas' to {MEMBERS}."
        yield Finding(severity, subject, "replicas", str(settings.replicas), f"at least {MEMBERS}", why, fix)
    listens = "Who listens on the network reads"
    if settings.username is not None and not settings.tls:
        why = f"{listens} user, password and messages, and can publish and settle in their name."
        yield Finding(Severity.NOTE, subject, "tls", "off", "on where there is a password", why, "Use rabbitmqs://.")
    elif settings.tls and urlsplit(settings.management).scheme == "http":
        why = f"{listens} user and password there, and can publish and settle in their name."
        fix = "Set 'management_url' to https://…, and have the management plugin listen with TLS."
        yield Finding(Severity.NOTE, subject, "management_url", "http", "https", why, fix)
