"""What a topic's exchanges, groups and lanes say about its safety: pure functions of what was answered."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from reliamq.spi import Finding, Severity, TopicSpec
from reliamq_rabbitmq.audit.answers import Binding, Exchange, Queue
from reliamq_rabbitmq.audit.commands import DECLARE, pattern_of
from reliamq_rabbitmq.audit.queues import Scene, queue_faults
from reliamq_rabbitmq.audit.rules import Fault, findings_of, names_of
from reliamq_rabbitmq.catalog.names import (
    facts_queue,
    group_exchange,
    lane_pattern,
    lane_queue,
    ledger_queue,
    members_exchange,
    quorum_arguments,
)

__all__ = ["TopicView", "exchange_faults", "group_subject", "missing_group", "missing_topic", "topic_findings"]

GONE = "What it held is gone; what is published is refused, or confirmed without it where another group gets it."
UNTOLD = "Nobody can publish: what the topic was declared with is written there."
FEW_LANES = 3
"""Of fewer it is no wonder that all have their leaders on one node."""
UNHEARD = "The group's members do not hear of one another, and get no lanes."


@dataclass(frozen=True, slots=True)
class TopicView:
    """exchanges, queues: the topic's and its groups', by name.

    bindings: by the exchange that they lead from.  returning: lanes that late retries come back to.
    """

    exchanges: Mapping[str, Exchange]
    queues: Mapping[str, Queue]
    bindings: Mapping[str, Sequence[Binding]]
    returning: frozenset[str]

    def from_(self, exchange: str) -> Sequence[Binding]:
        """The bindings that lead from it."""
        return self.bindings.get(exchange, ())

    def bound_groups(self, topic: str) -> list[str]:
        """Groups that get what is published."""
        ends = f"@{topic}"
        return [
            one.destination.removesuffix(ends)
            for one in self.from_(topic)
            if one.to_exchange and one.destination.endswith(ends)
        ]

    def declared_groups(self, topic: str) -> list[str]:
        """Groups that have an exchange, bound or not."""
        ends = f"@{topic}"
        return [name.removesuffix(ends) for name in self.exchanges if name.endswith(ends)]


def missing_topic(spec: TopicSpec) -> Finding:
    """It is not there."""
    why = "Publishing to it is rejected as unroutable."
    fix = f"{DECLARE} A topic that was deleted took its groups' bindings along."
    return Finding(Severity.LOSES, f"topic {spec.name}", "topic", "missing", "declared", why, fix)


def group_subject(topic: str, group: str) -> str:
    """What a group's findings are about."""
    return f"group {group} of topic {topic}"


def topic_findings(spec: TopicSpec, view: TopicView, scene: Scene) -> Iterator[Finding]:
    """Everything of one topic, whose exchange is there."""
    subject, topic = f"topic {spec.name}", spec.name
    for fault in exchange_faults(view.exchanges[topic], "fanout", scene):
        yield fault.of(subject)
    yield from _facts_findings(topic, view, scene)
    bound, wanted = view.bound_groups(topic), [group.name for group in spec.groups]
    yield from _destination_findings(topic, view, bound)
    for group in dict.fromkeys([*wanted, *bound, *view.declared_groups(topic)]):
        yield from _group_findings(topic, group, view, scene, is_used=group in wanted or group in bound)


def exchange_faults(exchange: Exchange, kind: str, scene: Scene) -> Iterator[Fault]:
    """kind: that it should be of."""
    fix = scene.commands.replace_exchange(exchange.name)
    for setting, found, required, why in (
        ("type", exchange.kind, kind, "Messages reach other queues than they should, or none."),
        ("durable", _word(exchange.durable), "true", "Its bindings are gone with its nodes, and messages go nowhere."),
        ("auto-delete", _word(exchange.auto_delete), "false", "It is deleted with its last binding."),
        ("internal", _word(exchange.internal), "false", "Publishing to it is refused."),
    ):
        if found != required:
            yield Fault(Severity.LOSES, f"exchange {setting}", found, required, why, fix)
    yield from _alternate_faults(exchange, scene)


def _alternate_faults(exchange: Exchange, scene: Scene) -> Iterator[Fault]:
    why = "What no queue of the group gets, as when a binding lacks, goes there and is confirmed instead of refused."
    policy = scene.policies.on_exchange(exchange) if scene.policies is not None else None
    places = []
    if exchange.alternate is not None:
        places.append((f"{exchange.alternate} by its declaration", scene.commands.replace_exchange(exchange.name)))
    if policy is not None and "alternate-exchange" in policy.definition:
        clear = scene.commands.clear_policy(policy.name, operator=policy.operator)
        places.append((f"{policy.definition['alternate-exchange']} by {policy}", clear))
    for found, fix in places:
        yield Fault(Severity.RISKS, "alternate-exchange", f"{found} on {exchange.name}", "none", why, fix)


def _facts_findings(topic: str, view: TopicView, scene: Scene) -> Iterator[Finding]:
    name, subject = facts_queue(topic), f"topic {topic}"
    queue = view.queues.get(name)
    if queue is None:
        yield Finding(Severity.LOSES, subject, f"queue {name}", "missing", "declared", UNTOLD, DECLARE)
        return
    expected, scene = quorum_arguments(scene.settings.replicas), replace(scene, family=pattern_of(name))
    yield from findings_of(subject, [(name, fault) for fault in queue_faults(queue, expected, scene)])


def _destination_findings(topic: str, view: TopicView, bound: Sequence[str]) -> Iterator[Finding]:
    """Who gets what is published to the topic."""
    ours = {group_exchange(topic, group) for group in bound}
    others = sorted(one.destination for one in view.from_(topic) if one.destination not in ours)
    subject, setting = f"topic {topic}", "bindings"
    if not bound and not others:
        why = "Publishing is rejected as unroutable until a group is declared; nothing that was confirmed is lost."
        yield Finding(Severity.RISKS, subject, "groups", "none bound", "at least one", why, DECLARE)
    elif others:
        severity, why = Severity.NOTE, "These get each message too; when they are full, publishing is refused."
        if not bound:
            severity, why = Severity.LOSES, "Messages are confirmed because these get them, and no group does."
        fix = "Delete the bindings that nobody needs; declare the groups that are missing."
        yield Finding(severity, subject, setting, names_of(others), "groups of the topic", why, fix)


# --- a group ----------------------------------------------------------------------------------------------------------


def missing_group(topic: str, group: str) -> Finding:
    """It is not there."""
    why = "Messages are confirmed without it where another group gets them; it never does."
    return Finding(Severity.LOSES, group_subject(topic, group), "group", "missing", "declared", why, DECLARE)


def _group_findings(topic: str, group: str, view: TopicView, scene: Scene, *, is_used: bool) -> Iterator[Finding]:
    """is_used: it is asked for or bound; another one may be half declared by somebody, at this moment."""
    subject, exchange = group_subject(topic, group), view.exchanges.get(group_exchange(topic, group))
    if exchange is None:
        yield missing_group(topic, group)
        return
    for fault in exchange_faults(exchange, "topic", scene):
        yield fault.of(subject)
    if group not in view.bound_groups(topic):
        severity = Severity.LOSES if is_used else Severity.RISKS
        why = "Messages are confirmed without it where another group gets them; it never does."
        yield Finding(severity, subject, "binding", "none from the topic", "bound to the topic", why, DECLARE)
    if is_used:
        yield from _lanes_findings(topic, group, view, scene)
    yield from _queues_findings(topic, group, view, scene)


def _lanes_findings(topic: str, group: str, view: TopicView, scene: Scene) -> Iterator[Finding]:
    """Whether all lanes are there and get what is theirs, and nothing else."""
    subject, lanes = group_subject(topic, group), _count_lanes(topic, group, view)
    if members_exchange(topic, group) not in view.exchanges:
        setting = f"exchange {members_exchange(topic, group)}"
        yield Finding(Severity.RISKS, subject, setting, "missing", "declared", UNHEARD, DECLARE)
    names = [lane_queue(topic, group, lane) for lane in range(lanes)]
    ledgers = [ledger_queue(topic, group, lane) for lane in range(lanes)]
    lacking = [name for name in (*names, *ledgers) if name not in view.queues]
    if lacking or not lanes:
        found = f"missing ({names_of(lacking)})" if lacking else "none"
        yield Finding(Severity.LOSES, subject, "queues", found, "declared", GONE, DECLARE)
    bindings = view.from_(group_exchange(topic, group))
    there = [view.queues[name] for name in names if name in view.queues]
    wanted = {(name, lane_pattern(lane, lanes)) for lane, name in enumerate(names) if name in view.queues}
    yield from _binding_findings(subject, wanted, {(one.destination, one.routing_key) for one in bindings})
    yield from _return_findings(subject, [queue.name for queue in there], view)
    yield from _leader_findings(topic, group, there, scene)


def _count_lanes(topic: str, group: str, view: TopicView) -> int:
    """How many it was declared with, also where some of them are missing: a power of two."""
    pattern = re.compile(re.escape(group_exchange(topic, group)) + r"/(\d+)(/ledger)?")
    numbers = [int(found[1]) for name in view.queues if (found := pattern.fullmatch(name))]
    # Each lane's binding tells it too; one that somebody added may tell otherwise, so that the most count.
    bindings = [one for one in view.from_(group_exchange(topic, group)) if pattern.fullmatch(one.destination)]
    digits = Counter(one.routing_key.count(".") for one in bindings).most_common(1)
    return max([1 << number.bit_length() for number in numbers] + [1 << count for count, _ in digits], default=0)


Route = tuple[str, str]
"""A queue, and the pattern of routing keys with which it is bound."""


def _binding_findings(subject: str, wanted: set[Route], there: set[Route]) -> Iterator[Finding]:
    if lacking := sorted(f"{queue} by {pattern}" for queue, pattern in wanted - there):
        why = "Messages of these keys are confirmed without the group where another group gets them, or refused."
        found = f"missing ({names_of(lacking)})"
        yield Finding(Severity.LOSES, subject, "bindings", found, "declared", why, DECLARE)
    if others := sorted(f"{queue} by {pattern}" for queue, pattern in there - wanted):
        why = "What is bound besides gets messages that are another lane's: they are handled twice, in any order."
        fix = "Delete the bindings that reliamq did not make."
        yield Finding(Severity.RISKS, subject, "bindings", names_of(others), "one of each lane", why, fix)


def _return_findings(subject: str, lanes: Sequence[str], view: TopicView) -> Iterator[Finding]:
    lacking = [name for name in lanes if name not in view.returning]
    if lacking:
        why = "What waits in the broker for a late retry does not come back; it stays where it waits."
        found = f"none from the delays ({names_of(lacking)})"
        yield Finding(Severity.RISKS, subject, "bindings", found, "bound to the delays", why, DECLARE)


def _leader_findings(topic: str, group: str, lanes: Sequence[Queue], scene: Scene) -> Iterator[Finding]:
    leaders = {lane.leader for lane in lanes}
    if len(lanes) < FEW_LANES or len(leaders) > 1 or any(len(lane.members or ()) <= 1 for lane in lanes):
        return
    why = "That node does the work of all lanes, and when it goes away all of them wait for a new leader."
    fix = scene.commands.rebalance(pattern_of(f"{group_exchange(topic, group)}/", end=""))
    found = f"all on {leaders.pop()}"
    yield Finding(Severity.NOTE, group_subject(topic, group), "leaders", found, "on several nodes", why, fix)


def _queues_findings(topic: str, group: str, view: TopicView, scene: Scene) -> Iterator[Finding]:
    """Each queue of the group by itself."""
    expected, start = quorum_arguments(scene.settings.replicas), f"{group_exchange(topic, group)}/"
    queues = [queue for name, queue in sorted(view.queues.items()) if name.startswith(start)]
    scene = replace(scene, family=pattern_of(start, end=""))
    faults = [(queue.name, fault) for queue in queues for fault in queue_faults(queue, expected, scene)]
    yield from findings_of(group_subject(topic, group), faults)


def _word(value: bool) -> str:
    return str(value).lower()
