"""Findings as a table for people and as JSON for programs.

Nothing is judged here: how bad a finding is was said by who found it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from reliamq.spi import Finding, Severity

__all__ = ["findings_table", "loses_messages", "to_json"]

STYLES = {
    Severity.LOSES: "bold red",
    Severity.RISKS: "yellow",
    Severity.UNSEEN: "magenta",
    Severity.NOTE: "dim",
}


def loses_messages(findings: Sequence[Finding]) -> bool:
    """Whether messages can be lost as it stands."""
    return any(finding.severity is Severity.LOSES for finding in findings)


def findings_table(findings: Sequence[Finding]) -> Table:
    """The worst first."""
    table = Table(show_lines=True)
    for column in ("", "what", "found", "required", "why, and what to do"):
        table.add_column(column, overflow="fold")
    for finding in sorted(findings, key=lambda one: list(Severity).index(one.severity)):
        style = STYLES[finding.severity]
        table.add_row(
            f"[{style}]{finding.severity}[/]",
            f"{finding.subject}\n{finding.setting}",
            finding.found,
            finding.required,
            f"{finding.why}\n{finding.fix}",
        )
    return table


def to_json(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """One object for each finding."""
    return [{name: str(value) for name, value in asdict(finding).items()} for finding in findings]
