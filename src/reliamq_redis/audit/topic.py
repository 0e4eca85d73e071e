"""One topic: whether all of it is there as it was declared, and what its groups have still to handle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from reliamq.spi import Finding, Severity, TopicSpec
from reliamq_redis.audit.commands import DECLARE, REPLAY, Commands
from reliamq_redis.audit.differences import differences
from reliamq_redis.audit.groups import group_faults
from reliamq_redis.audit.lanes import OddKey, TopicView, look_at_key, read_topic
from reliamq_redis.audit.questions import Questions, unseen
from reliamq_redis.audit.rules import Fault, names_of
from reliamq_redis.catalog.names import TopicKeys
from reliamq_redis.catalog.topics import TopicFacts
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.servers import Address

__all__ = ["audit_topic", "odd_key_findings", "topic_findings"]


async def audit_topic(
    questions: Questions, settings: RedisSettings, spec: TopicSpec, address: Address
) -> Sequence[Finding]:
    """address: of a server that holds data, for commands.  Raises the client's errors."""
    subject, key, commands = f"topic {spec.name}", TopicKeys(spec.name).facts, Commands(settings)
    odd = await look_at_key(questions, key, "hash")
    findings = list(odd_key_findings(subject, [odd] if odd else [], address, commands))
    told = None if odd is not None and odd.kind != "hash" else await questions.of_key(key, "HGETALL", key)
    if told is not None:
        facts = _facts(spec, told)
        if isinstance(facts, Finding):
            findings.append(facts)
        else:
            findings += differences(spec.name, facts, TopicFacts.asked(spec, settings.lanes))
            wanted = [group.name for group in spec.groups]
            view = await read_topic(questions, spec.name, facts.lanes, wanted)
            findings += topic_findings(spec, facts, view, address, commands)
    return [*findings, *unseen(subject, questions, address, commands)]


def _facts(spec: TopicSpec, told: Any) -> TopicFacts | Finding:
    """What it was declared with, or why that is not known."""
    subject = f"topic {spec.name}"
    try:
        facts = TopicFacts.read(told)
    except (ValueError, KeyError) as error:
        why, fix = "Nobody can publish to it or handle it.", "Restore what somebody changed in its hash."
        found = f"not to be read ({error!r}) in {TopicKeys(spec.name).facts}"
        return Finding(Severity.LOSES, subject, "topic", found, "as it was declared", why, fix)
    if facts is None:
        why = "Publishing to it is rejected as unroutable."
        fix = f"{DECLARE} If it was there before, its messages are gone: {REPLAY}."
        return Finding(Severity.LOSES, subject, "topic", "missing", "declared", why, fix)
    return facts


def odd_key_findings(subject: str, odd: Sequence[OddKey], address: Address, commands: Commands) -> Iterator[Finding]:
    """Keys of another type, or that are gone some day."""
    for one in odd:
        if one.kind != one.required:
            why = "Somebody else uses its name: what reliamq writes there is refused."
            fix = f"See what it is, and take it away: {commands.on_key(address, 'DEL', one.key)}; then {DECLARE}"
            found = f"{one.kind} ({one.key})"
            yield Finding(Severity.LOSES, subject, "type", found, one.required, why, fix)
    expiring = [one for one in odd if one.expires is not None]
    if expiring:
        soonest = min(one.expires or 0 for one in expiring) / 1000
        found = f"in {soonest:.0f} s ({names_of([one.key for one in expiring])})"
        why = "Then it is removed, with what is in it, handled or not."
        fix = "; ".join(commands.on_key(address, "PERSIST", one.key) for one in expiring[:4])
        yield Finding(Severity.LOSES, subject, "expires", found, "never", why, fix)


def topic_findings(
    spec: TopicSpec, facts: TopicFacts, view: TopicView, address: Address, commands: Commands
) -> Iterator[Finding]:
    """What there is to say about it and its groups."""
    odd = [*view.odd, *(one for lane in view.lanes for one in lane.odd)]
    yield from odd_key_findings(f"topic {spec.name}", odd, address, commands)
    yield from _lane_findings(spec, view)
    wanted = [group.name for group in spec.groups]
    for group in [*wanted, *(name for name in view.groups if name not in wanted)]:
        subject = f"group {group} of topic {spec.name}"
        yield from _presence_findings(subject, group, view, is_wanted=group in wanted)
        faults = group_faults(
            view, group, retention_seconds=facts.retention_seconds, address=address, commands=commands
        )
        for fault, streams in faults:
            yield fault.of(subject, streams)


def _lane_findings(spec: TopicSpec, view: TopicView) -> Iterator[Finding]:
    subject = f"topic {spec.name}"
    missing = [lane.stream for lane in view.lanes if not lane.exists]
    if missing and (spec.groups or view.groups):
        why = "Publishing to them is rejected, and what was in them is gone."
        fix = f"{DECLARE} If they were there before: {REPLAY}."
        found = f"missing ({names_of(missing)})"
        yield Finding(Severity.LOSES, subject, "streams", found, f"all {len(view.lanes)}", why, fix)
    if not spec.groups and not view.groups:
        why = "Nobody would receive a message, so that publishing is rejected as unroutable."
        yield Finding(Severity.RISKS, subject, "groups", "none", "at least one", why, "Declare a group.")


def _presence_findings(subject: str, group: str, view: TopicView, *, is_wanted: bool) -> Iterator[Finding]:
    there = [lane for lane in view.lanes if lane.groups is not None]
    without = [lane.stream for lane in there if group not in (lane.groups or {})]
    if without:
        fault = _missing(is_wanted=is_wanted)
        yield fault.of(subject, [] if len(without) == len(view.lanes) else without)
    elif there and is_wanted and view.declared is not None and group not in view.declared:
        why = "If its place on a stream is lost, nobody notices, and what it has not handled is removed."
        yield Finding(Severity.RISKS, subject, "group", "not among the declared ones", "among them", why, DECLARE)


def _missing(*, is_wanted: bool) -> Fault:
    if is_wanted:
        why = "Messages are confirmed without it, and it never gets what is removed before it is declared."
        return Fault(Severity.LOSES, "group", "missing", "on every stream", why, DECLARE)
    why = "It was declared; what is published meanwhile does not wait for it. Until it is there, nothing is removed."
    fix = f"{DECLARE} Or, when nobody needs it any more: SREM it from the topic's groups."
    return Fault(Severity.RISKS, "group", "missing", "on every stream", why, fix)
