"""Accounts for every message by id and key.  Pure: facts in, verdict out.

*Lost* is what was committed and has not taken effect; *doubled* took effect more than once; *reordered* took effect
before an earlier one of its key; *phantom* took effect though its transaction rolled back.  All four must be 0.  Of a
run that was interrupted only that is lost which was overtaken by a later one of its key; the rest was in flight and is
not judged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Committed", "Effected", "Facts", "Verdict", "check"]


@dataclass(frozen=True, slots=True)
class Committed:
    """A message whose business transaction committed.  number: its place in its key's commit order."""

    message_id: str
    key: str
    number: int
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Effected:
    """An effect, in the order in which effects were committed."""

    message_id: str
    key: str
    number: int
    amount: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known when all is over.

    balances: by key, as the effects left them; empty where there are none.  interrupted: it was over early.
    """

    committed: Sequence[Committed]
    effects: Sequence[Effected]
    confirmed: Sequence[str] = ()
    delivered: Sequence[str] = ()
    dead_letters: Sequence[str] = ()
    balances: Mapping[str, int] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The counters; ``examples`` names a few messages for each that is not 0.

    unconfirmed: took effect and no confirm was seen (its relay died between): harmless.  false_confirms: confirmed, and
    neither took effect nor is a dead letter.  unbalanced: keys whose balance is not the sum of their committed orders.
    in_flight: on its way when the run was interrupted, and not judged.
    """

    committed: int
    confirmed: int
    effects: int
    lost: int
    doubled: int
    reordered: int
    phantom: int
    false_confirms: int
    unbalanced: int
    redelivered: int
    dead_letters: int
    in_flight: int
    examples: Mapping[str, Sequence[str]]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        wrong = (self.lost, self.doubled, self.reordered, self.phantom, self.false_confirms, self.unbalanced)
        return not any(wrong)


def check(facts: Facts) -> Verdict:
    """Count."""
    in_flight = _in_flight(facts) if facts.interrupted else set()
    committed = {one.message_id: one for one in facts.committed}
    times = Counter(one.message_id for one in facts.effects)
    dead = set(facts.dead_letters)
    accounted_for = times.keys() | dead | in_flight
    confirmed = set(facts.confirmed)
    deliveries = Counter(facts.delivered)
    found = {
        "lost": [id_ for id_ in committed if id_ not in accounted_for],
        "doubled": [id_ for id_, count in times.items() if count > 1],
        "phantom": [id_ for id_ in times if id_ not in committed],
        "reordered": _reordered(facts.effects),
        "false_confirms": [id_ for id_ in confirmed if id_ not in accounted_for],
        "unbalanced": _unbalanced(facts, dead | in_flight),
    }
    return Verdict(
        committed=len(committed),
        confirmed=len(confirmed),
        effects=len(times),
        lost=len(found["lost"]),
        doubled=len(found["doubled"]),
        reordered=len(found["reordered"]),
        phantom=len(found["phantom"]),
        false_confirms=len(found["false_confirms"]),
        unbalanced=len(found["unbalanced"]),
        redelivered=sum(count - 1 for count in deliveries.values()),
        dead_letters=len(dead),
        in_flight=len(in_flight),
        examples={what: ids[:5] for what, ids in found.items() if ids},
    )


def _in_flight(facts: Facts) -> set[str]:
    """What has not taken effect, and nothing after it of its key has."""
    latest: dict[str, int] = defaultdict(int)
    for effect in facts.effects:
        latest[effect.key] = max(latest[effect.key], effect.number)
    settled = {one.message_id for one in facts.effects} | set(facts.dead_letters)
    return {one.message_id for one in facts.committed if one.number > latest[one.key]} - settled


def _reordered(effects: Sequence[Effected]) -> list[str]:
    """First effects that came after a later one of their key."""
    latest: dict[str, int] = defaultdict(int)
    seen: set[str] = set()
    late = []
    for one in effects:
        if one.message_id in seen:
            continue
        seen.add(one.message_id)
        if one.number < latest[one.key]:
            late.append(one.message_id)
        latest[one.key] = max(latest[one.key], one.number)
    return late


def _unbalanced(facts: Facts, without_effect: set[str]) -> list[str]:
    """Keys whose balance differs from what was committed, less what rightly has no effect."""
    due: dict[str, int] = defaultdict(int)
    for one in facts.committed:
        if one.message_id not in without_effect:
            due[one.key] += one.amount
    return [key for key, balance in facts.balances.items() if balance != due[key]]
