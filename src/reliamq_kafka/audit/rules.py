"""What one live value must be, and how much a value that is otherwise weighs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reliamq.spi import Durability, Finding, Severity

__all__ = ["Rule", "at_least", "is_not", "weighed"]


def weighed(severity: Severity, durability: Durability) -> Severity:
    """What a single node cannot have is one step less bad where *development* is asked: accepted, and said.

    Anything above *development* is replicated on Kafka: it confirms from its memory, so that only another machine's
    copy survives a crash.
    """
    if durability is not Durability.DEVELOPMENT:
        return severity
    return {Severity.LOSES: Severity.RISKS, Severity.RISKS: Severity.NOTE}.get(severity, severity)


@dataclass(frozen=True, slots=True)
class Rule:
    """One setting.

    safe: whether a live value will do.  required: the same for people.
    change: ``name=value`` that puts it right.
    """

    setting: str
    safe: Callable[[str], bool]
    required: str
    severity: Severity
    why: str
    change: str

    def judge(self, values: Mapping[str, str | None], subject: str, durability: Durability, fix: str) -> Finding | None:
        """The finding on a live value, or None when it is safe or was not told."""
        found = values.get(self.setting)
        if found is None or self.safe(found):
            return None
        severity = weighed(self.severity, durability)
        return Finding(severity, subject, self.setting, found, self.required, self.why, fix)


def at_least(least: int) -> Callable[[str], bool]:
    """Whether a value is a number and that large."""

    def safe(value: str) -> bool:
        return value.lstrip("-").isdigit() and int(value) >= least

    return safe


def is_not(unsafe: str) -> Callable[[str], bool]:
    """Whether a value is anything else."""

    def safe(value: str) -> bool:
        return value.lower() != unsafe

    return safe
