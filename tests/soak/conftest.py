"""One table of what the long forms saw, at the end of the run: what a closing note needs."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

OUTCOMES = ("passed", "failed", "error")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A row for each test: its outcome, its seconds, and what it noted with ``record_property``."""
    reports = [report for outcome in OUTCOMES for report in terminalreporter.stats.get(outcome, ())]
    rows = [report for report in reports if "tests/soak/" in report.nodeid]
    if rows:
        Console(width=200).print(_table(sorted(rows, key=lambda report: report.nodeid)))


def _table(reports: list[pytest.TestReport]) -> Table:
    table = Table("long form", "outcome", "seconds", "seen", title="soak")
    for report in reports:
        seen = " · ".join(f"{name} {value}" for name, value in report.user_properties)
        table.add_row(report.nodeid.rpartition("::")[2], report.outcome, f"{report.duration:.0f}", seen)
    return table
