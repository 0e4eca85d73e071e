"""An application in a folder of its own, and the command line run there."""

from __future__ import annotations

import os
import subprocess
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.cli import RELIAMQ
from tests.cli.forked import run_forked

APPLICATION = """
import os
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel
from reliamq import Backoff, Reliamq

class Order(BaseModel):
    number: int
    account: str = "ada"

app = Reliamq()
orders = app.topic("orders", Order, key=lambda order: order.account, max_message_bytes=1000)

@app.handler(orders, group="g", effects="repeatable", concurrency=16, retry=Backoff(attempts=3, first=timedelta(0)))
async def handle(order: Order) -> None:
    if order.account == "killer":
        os._exit(1)
    if order.account == "broken":
        raise ValueError("cannot")
    with Path("handled").open("a") as file:
        file.write(f"{order.number}\\n")
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "orders.py").write_text(textwrap.dedent(APPLICATION))
    (tmp_path / "reliamq.toml").write_text(
        'broker = "embedded:///broker.db"\ndatabase = "sqlite:///database.db"\n[worker]\nlease = 1.0\nprefetch = 60\n'
    )
    return tmp_path


@pytest.fixture
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``reliamq`` in the folder; with an environment of its own, from the start."""

    def run(
        *arguments: str, timeout: float = 60, input: str | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        if env is None:
            files = tmp_path_factory.mktemp("streams")
            return run_forked(arguments, folder=folder, files=files, timeout=timeout, input=input)
        command = [*RELIAMQ, *arguments]
        environment = {**os.environ, **env}
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=timeout, input=input, env=environment
        )

    return run
