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

from tests.cli import RELIAMQ

PROVE = [*RELIAMQ, "prove"]

BROKEN = [
    ("commit-then-send", "lost"),
    ("forget-confirm", "lost"),
    ("ack-first", "lost"),
    ("no-idempotency", "doubled"),
]


def prove(*arguments: str, timeout: float = 110, input: str | None = None) -> tuple[int, dict[str, int]]:
    done = subprocess.run([*PROVE, "--json", *arguments], capture_output=True, text=True, timeout=timeout, input=input)
    sys.stderr.write(done.stderr[-3000:])  # the last words of processes that ended by themselves, where the test fails
    assert done.returncode in (0, 1)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_under_fire_nothing_is_lost_doubled_or_reordered(tmp_path: Path) -> None:
    code, counters = prove("--messages", "600", "--seed", "7", "--report", str(tmp_path / "report.html"))

    assert code == 0
    assert counters["kills"] >= 5
    assert (counters["messages"], counters["rolled_back"], counters["unplaced"], counters["crashes"]) == (600, 30, 0, 0)
    assert counters["committed"] == counters["effects"] == 570
    assert [counters[name] for name in ("lost", "doubled", "reordered", "phantom")] == [0, 0, 0, 0]
    page = (tmp_path / "report.html").read_text()
    assert "lost 0 · doubled 0" in page
    assert "http" not in page.replace("http-equiv", "")


# MariaDB's own differences are seen by the tests of the stores
@pytest.mark.parametrize("fixture", ["postgresql_url", pytest.param("mariadb_url", marks=pytest.mark.slow)])
def test_it_holds_on_a_database_server_too(request: pytest.FixtureRequest, fixture: str) -> None:
    url: str = request.getfixturevalue(fixture)

    code, counters = prove("--messages", "200", "--database", url)

    assert code == 0
    assert counters["kills"] >= 5
    assert counters["committed"] == counters["effects"] == 190


@pytest.mark.parametrize(("rule", "counter"), BROKEN)
def test_a_broken_rule_is_caught(rule: str, counter: str) -> None:
    code, counters = prove("--break", rule, "--messages", "600", "--deadline", "5")

    assert code == 1
    assert counters[counter] > 0


def test_bodies_of_the_users_own_are_accounted_for() -> None:
    lines = [json.dumps({"key": f"k{number % 3}", "text": "ä" * number}) for number in range(40)]

    code, counters = prove("--input", "-", "--kill-every", "0", input="\n".join(lines))

    assert code == 0
    assert (counters["messages"], counters["rolled_back"]) == (40, 2)
    assert counters["effects"] == 38


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_process_and_judges_what_can_be_judged(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [*PROVE, "--messages", "100000", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    family = _wait_for_all(process.pid)
    time.sleep(5)  # some orders are placed
    process.send_signal(number)
    output, said = process.communicate(timeout=60)

    counters = json.loads(output.splitlines()[-1])
    assert process.returncode == 130, said
    assert counters["interrupted"] is True
    assert counters["committed"] == counters["effects"] + counters["in_flight"] > 0
    assert [counters[name] for name in ("lost", "false_confirms", "unbalanced", "unplaced")] == [0, 0, 0, 0]
    assert f"{counters['in_flight']} in flight, not judged" in said
    wait_until_gone(family)
    assert list(tmp_path.glob("reliamq-prove-*")) == []


SABOTEUR = """
import reliamq.proving.roles as roles
place = roles._place
def stumble(session, topic, plan, chosen):
    if chosen[0] == 30:
        raise RuntimeError("cannot be placed")
    return place(session, topic, plan, chosen)
roles._place = stumble
"""


def test_a_process_that_ends_by_itself_and_what_it_did_not_place_are_no_pass(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTEUR)  # every process of the prover begins with it
    done = subprocess.run(
        [*PROVE, "--json", "--messages", "60", "--deadline", "10", "--report", str(tmp_path / "page.html")],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )

    counters = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert (counters["lost"], counters["messages"]) == (0, 60)
    assert counters["committed"] + counters["rolled_back"] + counters["unplaced"] == 60
    assert counters["unplaced"] > 0
    assert counters["crashes"] > 0
    assert "application-0 ended with 1: RuntimeError: cannot be placed" in done.stderr
    assert "planned orders were not placed" in done.stderr


def test_killing_the_prover_leaves_no_process_behind() -> None:
    process = subprocess.Popen([*PROVE, "--messages", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family = _wait_for_all(process.pid)
    process.kill()
    process.wait()

    wait_until_gone(family)


def wait_until_gone(family: list[int]) -> None:
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
