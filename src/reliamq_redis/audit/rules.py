"""What one live value must be, how much a fault weighs, and how the same fault of several servers is said once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from reliamq.spi import Durability, Finding, Severity

__all__ = ["SHOWN", "Fault", "Rule", "findings_of", "is_the_word", "milder", "names_of", "weighed"]

SHOWN = 4
"""Names in one finding."""
MILDER = {Severity.LOSES: Severity.RISKS, Severity.RISKS: Severity.NOTE}


def milder(severity: Severity) -> Severity:
    """One step less bad."""
    return MILDER.get(severity, severity)


def weighed(severity: Severity, durability: Durability, needed_for: Durability = Durability.REPLICATED) -> Severity:
    """One step less bad where less is asked than the value is needed for: accepted, and said.

    durability: what the topics ask.  needed_for: the least that takes the value; *development*: everything does.
    """
    return severity if durability >= needed_for else milder(severity)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a finding says, but for its subject."""

    severity: Severity
    setting: str
    found: str
    required: str
    why: str
    fix: str
    passing: bool = False

    def of(self, subject: str, names: Sequence[str] = ()) -> Finding:
        """The finding.  names: of the keys that have it; none where the subject says it."""
        found = f"{self.found} ({names_of(names)})" if names else self.found
        return Finding(
            self.severity, subject, self.setting, found, self.required, self.why, self.fix, passing=self.passing
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """One value.

    safe: whether a live value will do.  required: the same for people.  change: as ``CONFIG SET`` takes it, or, where
    it is no setting, what to do in words.
    needed_for: the least durability that takes it.
    """

    setting: str
    safe: Callable[[str], bool]
    required: str
    severity: Severity
    why: str
    change: str
    needed_for: Durability = Durability.FSYNCED

    def judge(self, found: str | None, durability: Durability, fix: str) -> Fault | None:
        """The fault of a live value; None when it is safe or was not told."""
        if found is None or self.safe(found):
            return None
        severity = weighed(self.severity, durability, self.needed_for)
        return Fault(severity, self.setting, found, self.required, self.why, fix)


def is_the_word(word: str) -> Callable[[str], bool]:
    """Whether a value is that word."""

    def safe(value: str) -> bool:
        return value.lower() == word

    return safe


def findings_of(kind: str, faults: Iterable[tuple[str, Fault]]) -> Iterator[Finding]:
    """One finding for all servers that have the same fault.  kind: of server, in the singular.  faults: by server."""
    alike: dict[tuple[object, ...], list[tuple[str, Fault]]] = {}
    for name, fault in faults:
        key = (fault.severity, fault.setting, fault.found, fault.required, fault.why, fault.passing)
        alike.setdefault(key, []).append((name, fault))
    for those in alike.values():
        fault, names = those[0][1], [name for name, _ in those]
        if any(other.fix != fault.fix for _, other in those):
            fault = replace(fault, fix=f"{fault.fix} And so for the others.")
        yield fault.of(f"{kind}{'s' if len(names) > 1 else ''} {names_of(names)}")


def names_of(names: Sequence[str]) -> str:
    """``a, b and 9 more``."""
    shown, more = ", ".join(names[:SHOWN]), len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
