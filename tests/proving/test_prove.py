"""The prover on real processes: nothing is lost under fire, and every broken rule is caught."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROVE = [sys.executable, "-c", "from reliamq.cli import main; main()", "prove"]

BROKEN = [
    ("commit-then-send", "lost"),
    ("forget-confirm", "lost"),
    ("ack-first", "lost"),
    ("no-idempotency", "doubled"),
]


def prove(*arguments: str, timeout: float = 110) -> tuple[int, dict[str, int]]:
    done = subprocess.run([*PROVE, "--json", *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_under_fire_nothing_is_lost_doubled_or_reordered(tmp_path: Path) -> None:
    code, counters = prove("--messages", "600", "--seed", "7", "--report", str(tmp_path / "report.html"))

    assert code == 0
    assert counters["kills"] >= 5
    assert counters["messages"] == counters["committed"] == counters["effects"] == 570
    assert [counters[name] for name in ("lost", "doubled", "reordered", "phantom")] == [0, 0, 0, 0]
    page = (tmp_path / "report.html").read_text()
    assert "lost 0 · doubled 0" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught(rule: str, counter: str) -> None:
    code, counters = prove("--break", rule, "--messages", "600", "--deadline", "5")

    assert code == 1
    assert counters[counter] > 0


def test_bodies_of_the_users_own_are_accounted_for(tmp_path: Path) -> None:
    lines = [json.dumps({"key": f"k{number % 3}", "text": "ä" * number}) for number in range(40)]
    (tmp_path / "bodies.ndjson").write_text("\n".join(lines))

    code, counters = prove("--input", str(tmp_path / "bodies.ndjson"), "--kill-every", "0")

    assert code == 0
    assert counters["effects"] == 38


def test_ctrl_c_ends_every_process_and_prints_the_ledger_so_far() -> None:
    process = subprocess.Popen(
        [*PROVE, "--messages", "100000", "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    _wait_for_all(process.pid)
    time.sleep(5)  # some orders are placed
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)

    counters = json.loads(output.splitlines()[-1])
    assert counters["interrupted"] is True
    assert counters["committed"] > 0
    assert _children_of(process.pid) == []


def test_killing_the_prover_leaves_no_process_behind() -> None:
    process = subprocess.Popen([*PROVE, "--messages", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family = _wait_for_all(process.pid)
    process.kill()
    process.wait()

    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _wait_for_all(pid: int) -> list[int]:
    """Until six processes run, besides the fork server and its tracker."""
    deadline = time.monotonic() + 60
    while len(family := _family(pid)) < 8:
        assert time.monotonic() < deadline, family
        time.sleep(0.1)
    return family


def _children_of(pid: int) -> list[int]:
    done = subprocess.run(["/bin/ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(one) for one in done.stdout.split()]


def _family(pid: int) -> list[int]:
    children = _children_of(pid)
    return children + [one for child in children for one in _family(child)]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except (OSError, IndexError):
        return not os.path.exists(f"/proc/{pid}")
