"""How much a fault weighs, and how the same fault of many queues is said once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from reliamq.spi import Durability, Finding, Severity

__all__ = ["Fault", "findings_of", "names_of", "weighed"]

SHOWN = 4


def weighed(severity: Severity, durability: Durability) -> Severity:
    """What a single node cannot have is one step less bad where less than *replicated* is asked: accepted, and said.

    A quorum queue is on the disk before it confirms, so that one node's is enough for *fsynced*.
    """
    if durability is Durability.REPLICATED:
        return severity
    return {Severity.LOSES: Severity.RISKS, Severity.RISKS: Severity.NOTE}.get(severity, severity)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a finding says, but for the queue."""

    severity: Severity
    setting: str
    found: str
    required: str
    why: str
    fix: str
    passing: bool = False

    def of(self, subject: str, names: Sequence[str] = ()) -> Finding:
        """The finding.  names: of the queues that have it; none where the subject says it."""
        found = f"{self.found} ({names_of(names)})" if names else self.found
        return Finding(
            self.severity, subject, self.setting, found, self.required, self.why, self.fix, passing=self.passing
        )


def findings_of(subject: str, faults: Iterable[tuple[str, Fault]]) -> list[Finding]:
    """One finding for all queues that have the same fault.  faults: by a queue's name."""
    alike: dict[tuple[object, ...], list[tuple[str, Fault]]] = {}
    for name, fault in faults:
        key = (fault.severity, fault.setting, fault.found, fault.required, fault.why, fault.passing)
        alike.setdefault(key, []).append((name, fault))
    return [_of_all(subject, those) for those in alike.values()]


def _of_all(subject: str, those: Sequence[tuple[str, Fault]]) -> Finding:
    first = those[0][1]
    if any(fault.fix != first.fix for _, fault in those):
        first = replace(first, fix=f"{first.fix} And so for the others.")
    return first.of(subject, [name for name, _ in those])


def names_of(names: Sequence[str]) -> str:
    """``a, b and 9 more``."""
    shown, more = ", ".join(names[:SHOWN]), len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
