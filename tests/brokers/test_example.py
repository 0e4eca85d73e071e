"""The example application runs on every broker; which one is one line of its configuration."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.brokers.application import Broker, wait_until
from tests.cli import RELIAMQ

pytestmark = pytest.mark.timeout(120)

SHOP = Path(__file__).parents[2] / "examples" / "shop"
ORDERS = 60


def configured(folder: Path, url: str) -> Path:
    """A copy of the example, with one line changed."""
    shutil.copytree(SHOP, folder / "shop", ignore=shutil.ignore_patterns("*.db*", "__pycache__"))
    settings = folder / "shop" / "reliamq.toml"
    before = settings.read_text()
    after = re.sub(r'^broker = ".*"$', f'broker = "{url}"', before, count=1, flags=re.MULTILINE)
    changed = [pair for pair in zip(before.splitlines(), after.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(changed) <= 1
    settings.write_text(after)
    return folder / "shop"


@contextmanager
def running(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(folder)}
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def rows(folder: Path, query: str) -> list[tuple[int, ...]]:
    connection = sqlite3.connect(folder / "shop.db", timeout=10)
    try:
        return connection.execute(query).fetchall()
    except sqlite3.OperationalError:  # not there yet
        return []
    finally:
        connection.close()


def run_shop(folder: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(running(folder, *RELIAMQ, "relay", "shop:app"))
        worker = stack.enter_context(running(folder, *RELIAMQ, "run", "shop:app"))
        place = [sys.executable, "place.py", str(ORDERS)]
        subprocess.run(place, cwd=folder, check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(folder)})
        wait_until(lambda: len(rows(folder, "SELECT 1 FROM charges")) >= ORDERS // 3)
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)
        stack.enter_context(running(folder, *RELIAMQ, "run", "shop:app"))
        for table in ("charges", "parcels"):
            wait_until(lambda table=table: len(rows(folder, f"SELECT 1 FROM {table}")) >= ORDERS)  # type: ignore[misc]
        time.sleep(1)  # what comes twice would come now


def judge(folder: Path) -> None:
    everything = [(number,) for number in range(ORDERS)]
    assert rows(folder, "SELECT number FROM orders ORDER BY number") == everything
    for table in ("charges", "parcels"):
        assert rows(folder, f'SELECT "order" FROM {table} ORDER BY "order"') == everything, table
    for customer in range(5):
        charged = rows(folder, f"SELECT \"order\" FROM charges WHERE customer = 'customer {customer}' ORDER BY number")
        assert charged == sorted(charged)


def test_the_shop_charges_each_order_once_and_in_order(broker: Broker, tmp_path: Path) -> None:
    folder = configured(tmp_path, broker.url)
    run_shop(folder)
    judge(folder)


def test_the_shop_runs_without_a_server_as_it_is(tmp_path: Path) -> None:
    folder = configured(tmp_path, "embedded:///broker.db")
    run_shop(folder)
    judge(folder)
