"""Supervised workers: a message that kills its process, a killed worker, a clean stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.conftest import Run


@contextmanager
def running_worker(folder: Path, workers: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable,
        "-c",
        "from reliamq.cli import main; main()",
        "run",
        "orders:app",
        "--workers",
        str(workers),
    ]
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def handled(folder: Path) -> list[int]:
    path = folder / "handled"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_message_that_kills_its_process_ends_as_a_dead_letter_and_its_neighbours_are_handled(
    run: Run, folder: Path
) -> None:
    """C4"""
    lines = [json.dumps({"number": number, "account": f"account {number}"}) for number in range(50)]
    lines.insert(20, json.dumps({"number": 1000, "account": "killer"}))
    (folder / "orders.ndjson").write_text("\n".join(lines))
    assert run("publish", "orders", "--app", "orders:app", "--file", "orders.ndjson").returncode == 0

    def dead() -> list[dict[str, str]]:
        return json.loads(run("dead-letters", "list", "--app", "orders:app", "--json").stdout)  # type: ignore[no-any-return]

    with running_worker(folder):
        wait_until(lambda: bool(dead()), seconds=90)
        wait_until(lambda: set(handled(folder)) == set(range(50)))

    (record,) = dead()
    shown = json.loads(run("dead-letters", "show", record["message"], "--app", "orders:app").stdout)
    assert json.loads(shown["body"])["account"] == "killer"
    assert "the process died" in shown["reason"]


def test_a_killed_worker_is_started_again_and_its_messages_are_handled(run: Run, folder: Path) -> None:
    """C2"""
    lines = [json.dumps({"number": number, "account": str(number % 7)}) for number in range(2000)]
    (folder / "orders.ndjson").write_text("\n".join(lines))
    with running_worker(folder, workers=2):
        wait_until(lambda: (folder / "worker.log").read_text().count("started") == 2)
        assert run("publish", "orders", "--app", "orders:app", "--file", "orders.ndjson").returncode == 0
        first = int((folder / "worker.log").read_text().split("worker ")[1].split(" ")[0])
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: set(handled(folder)) == set(range(2000)))
        wait_until(lambda: "was killed by signal 9" in (folder / "worker.log").read_text())


def test_sigterm_ends_all_workers_with_exit_code_0(folder: Path) -> None:
    """C8"""
    with running_worker(folder, workers=2) as process:
        wait_until(lambda: (folder / "worker.log").exists() and "started" in (folder / "worker.log").read_text())
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
