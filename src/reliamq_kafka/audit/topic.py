"""What a topic's partitions and settings say about its safety: pure functions of what the cluster answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from reliamq.spi import Durability, Finding, Severity, TopicSpec
from reliamq_kafka.audit.commands import Commands
from reliamq_kafka.audit.rules import Rule, at_least, is_not, weighed
from reliamq_kafka.catalog.own_topics import LOG, POLICIES
from reliamq_kafka.catalog.topics import OVERHEAD_BYTES
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import Broker, Partition

__all__ = ["IN_SYNC", "REPLICAS", "missing_topic", "own_topic_findings", "partition_findings", "setting_findings"]

REPLICAS = 3
"""Three, so that one may be away and the other two still confirm."""
IN_SYNC = 2
KEEPS_ALL = "-1"

CLEAN_ELECTION = Rule(
    "unclean.leader.election.enable",
    is_not("true"),
    "false",
    Severity.LOSES,
    "A replica that lags behind may become the leader, and what it does not have is lost, confirmed or not.",
    "unclean.leader.election.enable=false",
)
KEPT = (
    Rule(
        "retention.ms",
        lambda value: value == KEEPS_ALL,
        "-1 (reliamq removes what every group has finished)",
        Severity.RISKS,
        "Kafka removes records of that age, whether or not every group has handled them.",
        "retention.ms=-1",
    ),
    Rule(
        "retention.bytes",
        lambda value: value == KEEPS_ALL,
        "-1 (reliamq removes what every group has finished)",
        Severity.RISKS,
        "Kafka removes the oldest records of a partition of that size, whether or not every group has handled them.",
        "retention.bytes=-1",
    ),
)


def missing_topic(spec: TopicSpec) -> Finding:
    """It is not there."""
    why = "Publishing to it is rejected as unroutable."
    fix = "Start the application once, or call 'await app.declare()'; a topic that was deleted took its messages along."
    return Finding(Severity.LOSES, f"topic {spec.name}", "topic", "missing", "declared", why, fix)


def setting_findings(
    spec: TopicSpec, values: Mapping[str, str | None], settings: KafkaSettings, commands: Commands
) -> Iterator[Finding]:
    """The topic's effective settings: its own, or the brokers' defaults."""
    subject = f"topic {spec.name}"
    rules = (_enough_in_sync(settings), CLEAN_ELECTION, *KEPT, _large_enough(spec))
    yield from _judged(rules, spec.name, values, spec.durability, commands)
    # These two lose messages on any number of machines, so *development* makes them no better.
    if "compact" in (values.get("cleanup.policy") or ""):
        why = "Of several messages with one key only the last is kept; the others are removed, handled or not."
        fix = commands.set_on_topic(spec.name, "cleanup.policy=delete")
        yield Finding(Severity.LOSES, subject, "cleanup.policy", str(values["cleanup.policy"]), "delete", why, fix)
    yield from _timestamp_findings(spec, values, commands)


def _judged(
    rules: Sequence[Rule], topic: str, values: Mapping[str, str | None], durability: Durability, commands: Commands
) -> Iterator[Finding]:
    """What the rules say of the topic's settings.  values: none if they could not be read, which was said then."""
    subject = f"topic {topic}"
    for rule in rules:
        if values and values.get(rule.setting) is None:
            why, fix = "What is not told is not known to be safe.", "Ask who runs the cluster."
            yield Finding(Severity.UNSEEN, subject, rule.setting, "not told", rule.required, why, fix)
        elif finding := rule.judge(values, subject, durability, commands.set_on_topic(topic, rule.change)):
            yield finding


def own_topic_findings(
    name: str,
    partitions: Sequence[Partition],
    brokers: Sequence[Broker],
    values: Mapping[str, str | None],
    durability: Durability,
    settings: KafkaSettings,
) -> list[Finding]:
    """A topic of reliamq's own.  values: its effective settings."""
    commands, policy = Commands(settings), POLICIES[name]
    rules = (_enough_in_sync(settings), CLEAN_ELECTION, _cleaned_by(policy), *(KEPT if policy == LOG else ()))
    return [
        *partition_findings(name, partitions, brokers, IN_SYNC, durability, commands),
        *_judged(rules, name, values, durability, commands),
    ]


def _cleaned_by(policy: str) -> Rule:
    return Rule(
        "cleanup.policy",
        lambda value: value == policy,
        policy,
        Severity.LOSES,
        "Kafka removes what reliamq still needs.",
        f"cleanup.policy={policy}",
    )


def _enough_in_sync(settings: KafkaSettings) -> Rule:
    least = max(IN_SYNC, settings.min_insync_replicas)
    return Rule(
        "min.insync.replicas",
        at_least(least),
        f"at least {least}",
        Severity.LOSES,
        "A message is confirmed when fewer brokers have it than may be lost: with the last one it is gone.",
        f"min.insync.replicas={least}",
    )


def _large_enough(spec: TopicSpec) -> Rule:
    least = spec.max_message_bytes + OVERHEAD_BYTES
    return Rule(
        "max.message.bytes",
        at_least(least),
        f"at least {least} (messages of {spec.max_message_bytes} and what comes with them)",
        Severity.NOTE,
        "Larger messages are rejected; none that was confirmed is lost.",
        f"max.message.bytes={least}",
    )


def _timestamp_findings(spec: TopicSpec, values: Mapping[str, str | None], commands: Commands) -> Iterator[Finding]:
    found = values.get("message.timestamp.type")
    if found is None or found == "LogAppendTime":
        return
    keeps_all = values.get("retention.ms") == KEEPS_ALL
    why = "The producers' clocks decide when Kafka removes a message: one that is behind has its own removed early."
    if keeps_all:
        why = "A producer whose clock is far ahead is refused (message.timestamp.after.max.ms)."
    fix = commands.set_on_topic(spec.name, "message.timestamp.type=LogAppendTime")
    severity = Severity.NOTE if keeps_all else weighed(Severity.RISKS, spec.durability)
    setting = "message.timestamp.type"
    yield Finding(severity, f"topic {spec.name}", setting, found, "LogAppendTime", why, fix)


# --- replicas ---------------------------------------------------------------------------------------------------------


def partition_findings(
    topic: str,
    partitions: Sequence[Partition],
    brokers: Sequence[Broker],
    least_in_sync: int,
    durability: Durability,
    commands: Commands,
) -> Iterator[Finding]:
    """Where the copies of a topic's partitions are, and whether they are whole.

    least_in_sync: the topic's min.insync.replicas.
    """
    yield from _replica_findings(topic, partitions, brokers, durability, commands)
    yield from _spare_findings(topic, partitions, least_in_sync, durability, commands)
    yield from _state_findings(topic, partitions, least_in_sync, durability)


def _replica_findings(
    topic: str,
    partitions: Sequence[Partition],
    brokers: Sequence[Broker],
    durability: Durability,
    commands: Commands,
) -> Iterator[Finding]:
    """How many copies there really are, and on how many racks.

    The copies are counted and the settings not believed: since Kafka 3.7 a topic with one replica confirms by that one,
    whatever min.insync.replicas says.
    """
    subject = f"topic {topic}"
    racks = {broker.number: broker.rack for broker in brokers}
    for count in sorted({len(part.replicas) for part in partitions if len(part.replicas) < REPLICAS}):
        few = [part for part in partitions if len(part.replicas) == count]
        fix = commands.reassign(topic, few[0].number, _more_replicas(few[0].replicas, brokers))
        if count == 1:
            severity, why = Severity.LOSES, "The only copy of a confirmed message is lost with its broker."
        else:
            severity = Severity.RISKS
            why = "With one broker away there is one copy left, and then publishing stops or hangs on a single disk."
        found, required = f"{count} ({_numbers(few)})", f"{REPLICAS} of each partition"
        yield Finding(weighed(severity, durability), subject, "replicas", found, required, why, fix)
    for spread in (1, 2):
        near = [part for part in partitions if _racks_of(part, racks) == spread and spread < len(part.replicas)]
        if near:
            fix = commands.reassign(topic, near[0].number, _spread_replicas(near[0].replicas, brokers))
            yield _rack_finding(subject, near, spread, durability, fix)


def _spare_findings(
    topic: str, partitions: Sequence[Partition], least_in_sync: int, durability: Durability, commands: Commands
) -> Iterator[Finding]:
    """Whether a broker may be away."""
    tight = [part for part in partitions if REPLICAS <= len(part.replicas) <= least_in_sync]
    if tight:
        found = f"{least_in_sync} of {len(tight[0].replicas)} replicas ({_numbers(tight)})"
        why = "Each broker that is away, for a restart even, stops publishing to them; nothing is lost."
        fix = commands.set_on_topic(topic, f"min.insync.replicas={IN_SYNC}") + ", or give it more replicas."
        severity = weighed(Severity.RISKS, durability)
        required = "fewer than there are replicas"
        yield Finding(severity, f"topic {topic}", "min.insync.replicas", found, required, why, fix)


def _racks_of(partition: Partition, racks: Mapping[int, str | None]) -> int | None:
    """On how many racks a partition is; None where that of a replica is not known."""
    known = {racks.get(number) for number in partition.replicas}
    return None if None in known else len(known)


def _rack_finding(subject: str, near: Sequence[Partition], spread: int, durability: Durability, fix: str) -> Finding:
    """All on one rack can be gone at once.  On two, those that confirmed can be on the one that is gone."""
    if spread == 1:
        severity, found = Severity.LOSES, f"all on one ({_numbers(near)})"
        why = "Kafka confirms from memory: a power cut of that rack loses what was confirmed."
    else:
        severity, found = Severity.RISKS, f"on two racks ({_numbers(near)})"
        why = "While the replica on the other rack is away, one rack alone has what is confirmed."
    required = "a rack of its own for each replica, up to three"
    return Finding(weighed(severity, durability), subject, "racks of replicas", found, required, why, fix)


def _state_findings(
    topic: str, partitions: Sequence[Partition], least_in_sync: int, durability: Durability
) -> Iterator[Finding]:
    subject = f"topic {topic}"
    headless = [part for part in partitions if part.leader < 0]
    if headless:
        why = "Nothing can be published to them or read from them until a replica that was in sync is back."
        fix = f"Start {_brokers(headless)}; never elect another replica as leader: it does not have all."
        severity = weighed(Severity.LOSES, durability)
        found = f"none ({_numbers(headless)})"
        yield Finding(severity, subject, "leader", found, "one of each", why, fix, passing=True)
    # Kafka does not ask for more in-sync replicas than there are replicas.
    stopped = [part for part in partitions if len(part.in_sync) < min(least_in_sync, len(part.replicas))]
    lagging = [part for part in partitions if len(part.in_sync) < len(part.replicas) and part not in stopped]
    for few, severity, why in (
        (stopped, Severity.LOSES, "Publishing stops, and what is there hangs on the replicas that are left."),
        (lagging, Severity.RISKS, "A further broker that fails stops publishing or takes the last whole copy along."),
    ):
        if few:
            found = ", ".join(
                f"{len(part.in_sync)} of {len(part.replicas)} (partition {part.number})" for part in few[:3]
            )
            found += f" and {len(few) - 3} more partitions" if len(few) > 3 else ""
            fix = (
                f"Start {_brokers(few)}, or find out why it does not keep up (disk, network, replica.lag.time.max.ms)."
            )
            required = f"all, and never below {least_in_sync}"
            severity = weighed(severity, durability)
            yield Finding(severity, subject, "replicas in sync", found, required, why, fix, passing=True)


def _brokers(partitions: Iterable[Partition]) -> str:
    away = sorted({number for part in partitions for number in part.replicas if number not in part.in_sync})
    away = away or sorted({number for part in partitions for number in part.replicas})
    return f"broker{'s' if len(away) > 1 else ''} {', '.join(map(str, away))}"


def _numbers(partitions: Sequence[Partition]) -> str:
    """``partitions 0, 1, 2 and 9 more``."""
    shown = ", ".join(str(part.number) for part in partitions[:6])
    more = f" and {len(partitions) - 6} more" if len(partitions) > 6 else ""
    return f"partition{'s' if len(partitions) > 1 else ''} {shown}{more}"


def _more_replicas(replicas: Sequence[int], brokers: Sequence[Broker]) -> list[int]:
    """The replicas and further brokers, those on other racks first."""
    racks = {broker.number: broker.rack for broker in brokers}
    used = {racks.get(number) for number in replicas}
    others = sorted((one for one in brokers if one.number not in replicas), key=lambda one: one.rack in used)
    return [*replicas, *(one.number for one in others)][:REPLICAS]


def _spread_replicas(replicas: Sequence[int], brokers: Sequence[Broker]) -> list[int]:
    """The first replica, and others on racks of their own as far as there are racks."""
    chosen = [broker for broker in brokers if broker.number == replicas[0]]
    rest = [broker for broker in brokers if broker.number != replicas[0]]
    while rest and len(chosen) < len(replicas):
        used = {broker.rack for broker in chosen}
        best = min(rest, key=lambda one: (one.rack in used, one.number not in replicas))
        chosen.append(best)
        rest.remove(best)
    return [broker.number for broker in chosen]
