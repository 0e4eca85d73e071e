"""An application on a broker of its own, in memory or in a file, with a database."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel

from reliamq import Backoff, Reliamq
from reliamq.settings import RelaySettings, Settings, WorkerSettings

QUICK = Backoff(attempts=3, first=timedelta(milliseconds=20), ceiling=timedelta(milliseconds=100))


class Order(BaseModel):
    number: int
    account: str = "ada"


class Cancelled(BaseModel):
    number: int


def settings(broker: str, folder: Path, *, lease: float = 1.0, prefetch: int = 100) -> Settings:
    return Settings(
        broker=broker,
        database=f"sqlite:///{folder}/database.db",
        worker=WorkerSettings(lease=timedelta(seconds=lease), prefetch=prefetch, stop_deadline=timedelta(seconds=5)),
        relay=RelaySettings(poll=timedelta(milliseconds=10)),
    )


@pytest.fixture(params=["memory", "embedded"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4()}" if request.param == "memory" else f"embedded:///{tmp_path}/broker.db"


@pytest.fixture
def app(broker: str, tmp_path: Path) -> Reliamq:
    return Reliamq(settings(broker, tmp_path))


@asynccontextmanager
async def working(app: Reliamq) -> AsyncIterator[Callable[[], None]]:
    """Run the application's worker; stopped cleanly at the end.  Gives the function that asks it to stop."""
    stop = anyio.Event()
    async with app, anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, stop)
        yield stop.set
        stop.set()


async def eventually(condition: Callable[[], bool], *, seconds: float = 15) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.005)


Working = Callable[[Reliamq], AbstractAsyncContextManager[Callable[[], None]]]
