"""A process that dies at any step neither loses the message nor doubles its effect (O1, O2, O4, C1, C2, I1, I2)."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = [
    ("place", "before insert"),
    ("place", "after insert"),
    ("place", "after commit"),
    ("relay", "before claim"),
    ("relay", "after claim"),
    ("relay", "before send"),
    ("relay", "after confirm"),
    ("relay", "before delete"),
    ("relay", "after delete"),
    ("work", "after receive"),
    ("work", "before start"),
    ("work", "before effect commit"),
    ("work", "after effect commit"),
    ("work", "before ack"),
    ("work", "after ack"),
]
ROLES = ["place", "relay", "work"]


def run(role: str, folder: Path, step: str = "") -> int:
    command = [sys.executable, "-m", "tests.crash.pipeline", role, str(folder), step]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize(("role", "step"), STEPS, ids=[f"{role} dies {step}" for role, step in STEPS])
def test_a_crash_at_this_step_loses_nothing_and_doubles_nothing(role: str, step: str, tmp_path: Path) -> None:
    for earlier in ROLES[: ROLES.index(role)]:
        assert run(earlier, tmp_path) == 0

    assert run(role, tmp_path, step) == -signal.SIGKILL
    for again in ROLES[ROLES.index(role) :]:
        assert run(again, tmp_path) == 0

    database = sqlite3.connect(tmp_path / "database.db")
    try:
        assert database.execute("SELECT number FROM orders").fetchall() == [(1,)]
        assert database.execute("SELECT number FROM effects").fetchall() == [(1,)]
        assert database.execute("SELECT count(*) FROM reliamq_outbox").fetchall() == [(0,)]
    finally:
        database.close()
