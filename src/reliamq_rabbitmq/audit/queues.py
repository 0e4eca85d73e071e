"""What one queue says about its safety: pure functions of what was answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reliamq.spi import Durability, Severity
from reliamq_rabbitmq.audit.answers import Node, Policy, Queue, Version
from reliamq_rabbitmq.audit.commands import Commands, pattern_of
from reliamq_rabbitmq.audit.policies import Policies
from reliamq_rabbitmq.audit.rules import Fault, weighed
from reliamq_rabbitmq.catalog.names import NO_DELIVERY_LIMIT
from reliamq_rabbitmq.settings import RabbitmqSettings

__all__ = ["MEMBERS", "Scene", "few_members", "queue_faults"]

MEMBERS = 3
"""Three, so that one may be away and the other two still confirm."""
LIMITED_BY_DEFAULT = (4,)
"""Since that version a queue without a delivery limit has one."""
EXPIRY = "message-ttl"
LENGTHS = ("max-length", "max-length-bytes")
KEPT_BACK = "reject-publish"
REQUIRED = {
    "x-single-active-consumer": "Two members may get messages of one key at once: they are handled in any order.",
    "x-message-ttl": "What waits here comes back at another time than it was told, or never.",
    "x-dead-letter-exchange": "What waits here does not come back.",
    "x-dead-letter-strategy": "What has waited is handed on without a confirm, and is lost where that fails.",
}
"""Arguments that a queue must have where they are expected; of the others it is enough that they do no harm."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What queues are judged by.

    version: None where it is not known.  nodes, policies: None where they could not be seen.
    family: the regular expression of all queues that are judged together.
    """

    settings: RabbitmqSettings
    commands: Commands
    durability: Durability
    version: Version | None = None
    nodes: Sequence[Node] | None = None
    policies: Policies | None = None
    family: str = ""


@dataclass(frozen=True, slots=True)
class _Told:
    """One value in effect on a queue.  by: where it is from.  removal: what takes it away."""

    value: Any
    by: str
    removal: str

    @property
    def found(self) -> str:
        return f"{self.value} by {self.by}"


def queue_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    """expected: what it should be declared with."""
    yield from _kind_faults(queue, scene)
    if queue.kind == "quorum":
        yield from _required_faults(queue, expected, scene)
        yield from _member_faults(queue, scene)
        yield from _delivery_faults(queue, expected, scene)
    yield from _expiry_faults(queue, expected, scene)
    yield from _length_faults(queue, expected, scene)
    yield from _dead_letter_faults(queue, expected, scene)
    yield from _timeout_faults(queue, expected, scene)


# --- what it is -------------------------------------------------------------------------------------------------------


def _kind_faults(queue: Queue, scene: Scene) -> Iterator[Fault]:
    """These lose messages on any number of machines, so *development* makes them no better."""
    fix = scene.commands.replace_queue(queue.name, quorum=queue.kind == "quorum")
    for setting, found, required, why in (
        ("type", queue.kind, "quorum", "Only a quorum queue is on more than one node; this one is lost with its own."),
        ("durable", _word(queue.durable), "true", "A transient queue and its messages are gone with its node."),
        ("auto-delete", _word(queue.auto_delete), "false", "It is deleted, messages and all, with its last consumer."),
        ("exclusive", _word(queue.exclusive), "false", "It is deleted, messages and all, with its owner's connection."),
    ):
        if found != required:
            yield Fault(Severity.LOSES, setting, found, required, why, fix)


def _required_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    fix = scene.commands.replace_queue(queue.name, quorum=True)
    for argument, why in REQUIRED.items():
        wanted, found = expected.get(argument), (queue.arguments or {}).get(argument)
        if wanted is not None and found != wanted:
            shown = "not set" if found is None else _word(found)
            yield Fault(Severity.LOSES, argument, shown, _word(wanted), why, fix)


# --- where it is ------------------------------------------------------------------------------------------------------


def _member_faults(queue: Queue, scene: Scene) -> Iterator[Fault]:
    if queue.members is None or queue.online is None:
        why, fix = "What is not told is not known to be safe.", "Look yourself: rabbitmq-queues quorum_status QUEUE"
        yield Fault(Severity.UNSEEN, "members", "not told", f"{MEMBERS}, online", why, fix)
        return
    if len(queue.members) < MEMBERS:
        yield few_members(len(queue.members), _growth(queue, scene), scene.durability)
    away = sorted(queue.members - queue.online)
    if away:
        yield _offline(len(queue.members), away, scene.durability)


def few_members(count: int, fix: str, durability: Durability) -> Fault:
    """A quorum queue with fewer members than three."""
    if count <= 1:
        severity, why = Severity.LOSES, "The only copy of a confirmed message is lost with its node's disk."
    else:
        # Both have what is confirmed, and neither goes on without the other.
        severity, why = Severity.RISKS, "With one node away nothing can be published, and one copy is left."
    return Fault(weighed(severity, durability), "members", str(count), f"at least {MEMBERS}", why, fix)


def _growth(queue: Queue, scene: Scene) -> str:
    """Members on as many further nodes as it lacks.

    Where there are no more nodes than members, one command for each mends all queues that are judged together.
    """
    running = sorted(node.name for node in scene.nodes or () if node.running)
    if len(running) == MEMBERS and scene.family:
        return scene.commands.grow(running, scene.family)
    others = [node for node in running if node not in (queue.members or ())]
    lacking = MEMBERS - len(queue.members or ())
    if scene.nodes is not None and len(others) < lacking:
        return f"Add or start nodes, then: {scene.commands.grow([], scene.family or pattern_of(queue.name))}"
    return scene.commands.grow(others[:lacking], pattern_of(queue.name))


def _offline(count: int, away: Sequence[str], durability: Durability) -> Fault:
    online, majority = count - len(away), count // 2 + 1
    if online < majority:
        severity, why = Severity.LOSES, "Publishing and handling stop until a majority of its members is back."
    else:
        severity, why = Severity.RISKS, "When a further member fails, publishing and handling may stop."
    fix = f"Start {', '.join(away)}; never delete the queue, or a member that is away."
    found = f"{online} of {count}"
    return Fault(weighed(severity, durability), "members online", found, "all", why, fix, passing=True)


# --- what removes or refuses messages ---------------------------------------------------------------------------------


def _expiry_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    waits = "x-message-ttl" in expected
    for told in _told(queue, EXPIRY, expected, scene):
        severity, why = Severity.LOSES, "The broker removes messages of so many milliseconds, handled or not."
        if waits:  # they are handed on and not removed
            severity, why = Severity.RISKS, "What waits here comes back earlier than it was told."
        yield Fault(severity, EXPIRY, told.found, "none" if not waits else "as declared", why, told.removal)
    for told in _told(queue, "expires", expected, scene):
        why = "The broker deletes the queue, messages and all, when nobody consumes from it for so many milliseconds."
        yield Fault(Severity.LOSES, "expires", told.found, "none", why, told.removal)


def _length_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    overflow = _overflow(queue, scene)
    for key in LENGTHS:
        for told in _told(queue, key, expected, scene):
            severity, why = Severity.LOSES, "When it is full, the broker drops its oldest messages, handled or not."
            if overflow == KEPT_BACK:
                severity = Severity.RISKS
                why = "When it is full, publishing is refused; groups with room have the message, again with each try."
            yield Fault(severity, key, told.found, "none", why, told.removal)
    if overflow != KEPT_BACK:
        why = "With a limit of its length, which a policy can set at any time, its oldest messages are dropped."
        fix = scene.commands.replace_queue(queue.name, quorum=queue.kind == "quorum")
        yield Fault(Severity.RISKS, "overflow", overflow, KEPT_BACK, why, fix)


def _overflow(queue: Queue, scene: Scene) -> str:
    """What it was declared with goes before what a policy says."""
    said = [policy.definition["overflow"] for policy in _policies_on(queue, scene) if "overflow" in policy.definition]
    return str(queue.argument("overflow") or (said[0] if said else "drop-head"))


def _delivery_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    """Of several limits the smallest counts."""
    why = "A message that was given back so often, by restarts and renewals too, is dropped."
    limits = [*_told(queue, "delivery-limit", expected, scene)]
    for told in limits:
        if isinstance(told.value, int) and 0 <= told.value < NO_DELIVERY_LIMIT:
            yield Fault(
                Severity.LOSES, "delivery-limit", told.found, f"at least {NO_DELIVERY_LIMIT}", why, told.removal
            )
    is_set = bool(limits) or queue.argument("delivery-limit") is not None
    if not is_set and scene.version is not None and scene.version >= LIMITED_BY_DEFAULT:
        fix = scene.commands.replace_queue(queue.name, quorum=True)
        found, required = "20 by default", f"at least {NO_DELIVERY_LIMIT}"
        yield Fault(Severity.LOSES, "delivery-limit", found, required, why, fix)


def _dead_letter_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    if "x-dead-letter-exchange" in expected:
        return  # what it was declared with goes before what a policy says
    for told in _told(queue, "dead-letter-exchange", expected, scene):
        why = "reliamq keeps dead letters itself; what a limit of the broker's removes goes there, without a confirm."
        yield Fault(Severity.NOTE, "dead-letter-exchange", told.found, "none", why, told.removal)


def _timeout_faults(queue: Queue, expected: Mapping[str, Any], scene: Scene) -> Iterator[Fault]:
    """RabbitMQ has it for single queues since 3.12."""
    needed = int(scene.settings.ack_timeout_seconds * 1000)
    for told in _told(queue, "consumer-timeout", expected, scene):
        if isinstance(told.value, int) and told.value < needed:
            why = "The broker takes back what a slow handler holds, by closing the channel, before reliamq renews it."
            fix = f"Set 'ack_timeout_seconds' to {told.value / 1000:g}, or take it away: {told.removal}"
            yield Fault(Severity.RISKS, "consumer-timeout", told.found, f"at least {needed}", why, fix)


def _told(queue: Queue, key: str, expected: Mapping[str, Any], scene: Scene) -> Iterator[_Told]:
    """Each place that sets ``key`` otherwise than expected."""
    value, argument = queue.argument(key), f"x-{key}"
    is_judged = argument in REQUIRED and argument in expected
    if value is not None and value != expected.get(argument) and not is_judged:
        yield _Told(value, "its declaration", scene.commands.replace_queue(queue.name, quorum=queue.kind == "quorum"))
    for policy in _policies_on(queue, scene):
        if key in policy.definition:
            removal = scene.commands.clear_policy(policy.name, operator=policy.operator)
            yield _Told(policy.definition[key], str(policy), removal)


def _policies_on(queue: Queue, scene: Scene) -> Sequence[Policy]:
    return scene.policies.on_queue(queue) if scene.policies is not None else ()


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
