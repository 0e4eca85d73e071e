"""``reliamq outbox parked``, ``show``, ``requeue`` and ``purge``: looking after what the broker will not have (O5)."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import outbox
from reliamq.database import now_seconds, open_engine
from reliamq.outbox import OutboxMessage
from reliamq.topics import Topic
from tests.cli.conftest import Run


class Order(BaseModel):
    number: int
    account: str = "ada"


orders = Topic("orders", Order, key=lambda order: order.account)
APP = ("--app", "orders:app")


@pytest.fixture
def parked(folder: Path) -> list[str]:
    """The ids of three rows that are parked, beside one that waits."""
    return anyio.run(_park, f"sqlite:///{folder}/database.db")


async def _park(url: str) -> list[str]:
    async with open_engine(url) as engine:
        await outbox.create_tables_async(engine)
        async with AsyncSession(engine) as session, session.begin():
            ids = [outbox.add(session, orders, Order(number=number), headers={"colour": "red"}) for number in range(4)]
        async with engine.begin() as connection:
            it = update(OutboxMessage).where(OutboxMessage.message_id.in_(ids[:3]))
            await connection.execute(it.values(parked_at=now_seconds(), attempts=10, error="invalid: too odd"))
    return ids[:3]


def counts(run: Run) -> tuple[int, int]:
    """How many wait, how many are parked."""
    found = json.loads(run("outbox", "status", *APP, "--json").stdout)
    return found["waiting"], found["parked"]


def test_a_parked_row_is_shown_whole(run: Run, parked: list[str]) -> None:
    shown = json.loads(run("outbox", "show", parked[1], *APP).stdout)

    assert (shown["message"], shown["topic"], shown["key"], shown["attempts"]) == (parked[1], "orders", "ada", 10)
    assert shown["error"] == "invalid: too odd"
    assert json.loads(shown["body"]) == {"number": 1, "account": "ada"}
    assert shown["headers"] == {"colour": "red"}


def test_parked_rows_are_sent_again_or_removed_as_named(run: Run, parked: list[str]) -> None:
    assert counts(run) == (1, 3)
    assert run("outbox", "requeue", parked[0], *APP).stdout == "1 requeued\n"
    assert counts(run) == (2, 2)
    assert run("outbox", "purge", parked[1], *APP, "--yes").stdout == "1 removed\n"
    assert counts(run) == (2, 1)
    assert run("outbox", "purge", "--all", *APP, "--yes").stdout == "1 removed\n"
    assert counts(run) == (2, 0)


def test_nothing_is_removed_unasked_or_where_an_id_is_wrong(run: Run, parked: list[str]) -> None:
    asked = run("outbox", "purge", "--all", *APP)
    assert asked.returncode == 1
    assert "Remove 3 messages that were never sent?" in asked.stdout + asked.stderr
    wrong = run("outbox", "purge", parked[0], "nope", *APP, "--yes")
    assert wrong.returncode == 2
    assert counts(run) == (1, 3)
