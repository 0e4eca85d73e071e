"""Applications that tests of several brokers run: in this process, and in worker processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import anyio
from pydantic import BaseModel

from reliamq import Reliamq
from reliamq.settings import Settings, WorkerSettings
from tests.cli.forked import run_forked


@dataclass(frozen=True)
class Broker:
    """A real one.  shares: the setting by which a topic is shared.  options: that make a killed member known soon."""

    name: str
    url: str
    shares: str
    options: dict[str, object] = field(default_factory=dict)

    @property
    def query(self) -> str:
        """The options, to be appended to a URL."""
        return "".join(f"&{name}={value}" for name, value in self.options.items())


class Order(BaseModel):
    number: int
    account: str


def make_app(
    broker: Broker, folder: Path, *, shares: int = 4, lease: float = 5.0, url: str | None = None, **options: object
) -> Reliamq:
    """An application whose topics have so many shares: partitions, lanes.  options: the backend's."""
    return Reliamq(
        Settings(
            broker=url or broker.url,
            database=f"sqlite:///{folder}/database.db",
            worker=WorkerSettings(lease=timedelta(seconds=lease), stop_deadline=timedelta(seconds=10)),
            backends={broker.name: {**broker.options, broker.shares: shares, **options}},
        )
    )


@asynccontextmanager
async def working(app: Reliamq) -> AsyncIterator[None]:
    """Run the application's worker; stopped cleanly at the end."""
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, stop)
        yield
        stop.set()


async def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.02)


async def publish(app: Reliamq, topic: str, numbers: range, accounts: int) -> None:
    async with anyio.create_task_group() as tasks:
        for number in numbers:
            order = Order(number=number, account=f"account {number % accounts}")
            tasks.start_soon(app.topics[topic].publish, order)


class Service:
    """``reliamq run`` on :mod:`tests.brokers.service`."""

    def __init__(self, broker: Broker, folder: Path, topic: str, options: str = "") -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SERVICE_FOLDER": str(folder),
            "SERVICE_TOPIC": topic,
            "RELIAMQ_BROKER": f"{broker.url}?{broker.shares}=1{options or broker.query}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }

    def publish(self, *jobs: dict[str, object]) -> None:
        (self.folder / "jobs.ndjson").write_text("\n".join(json.dumps(job) for job in jobs))
        self._reliamq("publish", self.environment["SERVICE_TOPIC"], "--file", "jobs.ndjson", "--app", TARGET).check()

    def dead_letters(self) -> list[dict[str, str]]:
        listed = self._reliamq(
            "dead-letters", "list", "--app", TARGET, "--json", "--topic", self.environment["SERVICE_TOPIC"]
        )
        return json.loads(listed.check())  # type: ignore[no-any-return]

    def _reliamq(self, *arguments: str) -> Finished:
        done = run_forked(arguments, folder=self.folder, files=self.folder, environment=self.environment)
        return Finished(done)

    @contextmanager
    def worker(
        self, command: tuple[str, ...] = ("-m", "reliamq.cli.worker_process"), **environment: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command, TARGET],
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    def lines(self, kind: str) -> list[int]:
        path = self.folder / kind
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


class Finished:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self._done = done

    def check(self) -> str:
        assert self._done.returncode == 0, self._done.stderr
        return self._done.stdout


TARGET = "tests.brokers.service:app"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
