"""Locks by the application's own database."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from reliamq import ConfigurationError, Reliamq
from reliamq.settings import Settings

pytestmark = pytest.mark.anyio
moment = timedelta(milliseconds=50)


REDIS = [pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in ("redis", "valkey")]


@pytest.fixture(params=["database", *REDIS])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Reliamq:
    """By what keeps its locks."""
    broker = f"memory://{uuid.uuid4()}"
    if request.param == "database":
        return Reliamq(Settings(broker=broker, database=f"sqlite:///{tmp_path}/database.db"))
    servers = request.getfixturevalue(request.param)
    return Reliamq(Settings(broker=broker, leases=servers.url, durability="replicated"))


@pytest.fixture
def name() -> str:
    """Of a lock that nobody had."""
    return f"nightly {uuid.uuid4()}"


async def test_one_holds_a_lock_and_each_holder_gets_a_newer_token(app: Reliamq, name: str) -> None:
    """I4"""
    async with app:
        async with app.lock(name) as first:
            with pytest.raises(TimeoutError, match=name):
                async with app.lock(name, wait=moment):
                    pass
            async with app.lock(f"not {name}", wait=moment):
                pass
        async with app.lock(name, lease=timedelta(seconds=1), wait=moment) as second:
            assert second.value > first.value


async def test_many_tasks_take_turns(app: Reliamq, name: str) -> None:
    """I4"""
    inside = most = 0

    async def enter() -> None:
        nonlocal inside, most
        async with app.lock(name):
            inside += 1
            most = max(most, inside)
            await anyio.sleep(0.005)
            inside -= 1

    async with app, anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(enter)

    assert most == 1


async def test_an_error_in_the_block_goes_on_as_it_was_and_gives_the_lock_back(app: Reliamq, name: str) -> None:
    async with app:
        with pytest.raises(ValueError, match="mine"):
            async with app.lock(name):
                raise ValueError("mine")
        async with app.lock(name, wait=moment):
            pass


async def test_without_a_database_or_closed_there_is_no_lock(app: Reliamq) -> None:
    bare = Reliamq(Settings(broker=f"memory://{uuid.uuid4()}"))
    async with bare:
        with pytest.raises(ConfigurationError, match="RELIAMQ_DATABASE"):
            bare.lock("door")

    with pytest.raises(ConfigurationError, match="inside 'async with app:'"):
        app.lock("door")
    async with app:
        pass
    with pytest.raises(ConfigurationError, match="inside 'async with app:'"):
        app.lock("door")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": ""}, "lock: name must be 1 to 255 printable characters"),
        ({"name": 3}, "lock: name must be 1 to 255 printable characters, not int 3"),
        ({"name": "door", "lease": 5}, r"lock 'door': lease must be a timedelta, not int 5"),
        ({"name": "door", "lease": timedelta(0)}, "lock 'door': lease must be longer than nothing"),
        ({"name": "door", "wait": -moment}, "lock 'door': wait must not be negative"),
    ],
)
async def test_a_wrong_parameter_of_a_lock_is_named(app: Reliamq, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        app.lock(**arguments)
