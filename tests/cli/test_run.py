"""Supervised workers: a message that kills its process, a killed worker, a clean stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli import RELIAMQ
from tests.cli.conftest import Run


@contextmanager
def running_worker(folder: Path, workers: int = 1, command: str = "run") -> Iterator[subprocess.Popen[bytes]]:
    line = [*RELIAMQ, command, "orders:app"]
    if command == "run":
        line += ["--workers", str(workers)]
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(line, cwd=folder, stdout=log, stderr=log)
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
        wait_until(lambda: log_of(folder).count("starting again") >= 3, seconds=90)  # its attempts
        wait_until(lambda: set(handled(folder)) == set(range(50)))
        wait_until(lambda: bool(dead()))

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


def test_a_plain_handler_that_overruns_the_stop_deadline_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """C8"""
    (tmp_path / "orders.py").write_text(
        textwrap.dedent("""
            import pathlib, time
            from pydantic import BaseModel
            from reliamq import Reliamq

            class Order(BaseModel):
                number: int

            app = Reliamq()
            orders = app.topic("orders", Order)

            @app.handler(orders, group="g", effects="repeatable")
            def handle(order: Order) -> None:
                pathlib.Path("started").touch()
                time.sleep(30)
        """)
    )
    (tmp_path / "reliamq.toml").write_text('broker = "embedded:///broker.db"\n[worker]\nstop_deadline = 0.5\n')
    (tmp_path / "orders.ndjson").write_text('{"number": 1}')
    command = [*RELIAMQ, "publish", "orders", "--app", "orders:app", "--file", "orders.ndjson"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    with running_worker(tmp_path) as process:
        wait_until((tmp_path / "started").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0

    assert "still running in thread" in log_of(tmp_path)


def log_of(folder: Path) -> str:
    path = folder / "worker.log"
    return path.read_text() if path.exists() else ""


def test_a_broker_that_is_away_at_the_start_is_tried_again_until_it_is_there(run: Run, folder: Path) -> None:
    (folder / "reliamq.toml").write_text('broker = "embedded:///later/broker.db"\ndatabase = "sqlite:///database.db"\n')
    (folder / "one.ndjson").write_text('{"number": 7}\n')
    with running_worker(folder):
        wait_until(lambda: log_of(folder).count("could not reach broker or database; starting again") >= 2)
        (folder / "later").mkdir()
        assert run("publish", "orders", "--app", "orders:app", "--file", "one.ndjson").returncode == 0
        wait_until(lambda: handled(folder) == [7])
    assert "could not be closed properly" not in log_of(folder)


def test_a_database_that_is_away_at_the_start_is_tried_again(folder: Path) -> None:
    (folder / "reliamq.toml").write_text('database = "sqlite:///nofolder/database.db"\n')
    with running_worker(folder):
        wait_until(lambda: log_of(folder).count("could not reach broker or database; starting again") >= 2)


def test_a_broker_that_falls_short_from_the_first_start_ends_all_with_exit_code_2(folder: Path) -> None:
    (folder / "reliamq.toml").write_text('durability = "replicated"\n')
    with running_worker(folder, workers=2) as process:
        assert process.wait(30) == 2
    assert "required replicated" in log_of(folder)
    assert "starting again" not in log_of(folder)


def test_a_relay_says_that_it_runs_and_how_much_it_sent(run: Run, folder: Path) -> None:
    place = (
        "from orders import *\nfrom reliamq import outbox\nfrom reliamq.database import open_sync_engine\n"
        "from sqlalchemy.orm import Session\nimport anyio\nanyio.run(app.create_tables)\n"
        "with open_sync_engine('sqlite:///database.db') as engine, Session(engine) as session:\n"
        "    outbox.add(session, orders, Order(number=1))\n    session.commit()\n"
    )
    assert subprocess.run([sys.executable, "-c", place], cwd=folder).returncode == 0
    with running_worker(folder, command="relay") as process:
        wait_until(lambda: '"waiting": 0' in run("outbox", "status", "--app", "orders:app", "--json").stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0

    assert "relaying from sqlite:///database.db to embedded:///broker.db" in log_of(folder)
    assert "1 sent and confirmed, 0 rejected" in log_of(folder)


def test_a_refusal_after_workers_have_run_well_does_not_stop_those_that_run(tmp_path: Path) -> None:
    """Somebody changes the configuration while one worker is started again."""
    worker = "import pathlib, sys, time; old = pathlib.Path('old'); again = old.exists(); old.touch()"
    worker += "; time.sleep(0.5); sys.exit(2 if again else 1)"
    supervise = (
        "import sys, logging; logging.basicConfig(level='INFO'); from reliamq.cli import supervisor\n"
        f"supervisor.STEADY_SECONDS = 0.3\nsupervisor.Supervisor([sys.executable, '-c', {worker!r}], 1).run()\n"
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", supervise], cwd=tmp_path, stderr=log)
    try:
        wait_until(lambda: "ended with 2; starting again" in (tmp_path / "log").read_text())
    finally:
        process.terminate()
        process.wait(20)
