"""A row that its broker refuses holds up nobody but its key (O5)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.backends import open_backend
from reliamq.outbox import OutboxMessage, SqlOutboxStore
from reliamq.outbox.table import columns_of
from reliamq.spi import Durability, GroupSpec, TopicSpec
from reliamq.topics import Topic

from .conftest import Order, relaying, until

pytestmark = pytest.mark.anyio
ROWS, POISON, LIMIT = 10_000, 5_000, 1_000
topic = Topic("orders", Order, key=lambda order: order.account)


async def test_among_ten_thousand_rows_one_that_is_refused_is_parked_with_its_error_and_the_others_are_sent(
    engine: AsyncEngine, tmp_path: Path
) -> None:
    messages = [
        topic.message(Order(account=f"{number % 100}" if number != POISON else "x" * LIMIT, number=number))
        for number in range(ROWS)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(OutboxMessage), [columns_of(message) for message in messages])
    backend = open_backend(f"embedded:///{tmp_path}/broker.db")
    spec = TopicSpec("orders", (GroupSpec("g"),), Durability.DEVELOPMENT, max_message_bytes=LIMIT)
    store = SqlOutboxStore(engine, max_attempts=2)
    async with backend.storage() as storage, backend.publisher() as publisher:
        await storage.declare([spec])
        async with relaying(store, publisher, batch=500):
            await until(lambda: _waiting(store, 1), seconds=60)
            await until(lambda: _waiting(store, 0), seconds=60)
            (parked,) = await store.parked(limit=10)
            assert parked.row.message.id == messages[POISON].id
            assert "too-large" in parked.error
            assert str(LIMIT) in parked.error

            await storage.declare([TopicSpec("orders", spec.groups, Durability.DEVELOPMENT, max_message_bytes=9_999)])
            assert await store.requeue([messages[POISON].id]) == 1
            await until(lambda: _waiting(store, 0), seconds=60)
        assert await store.parked(limit=10) == []

    numbers: list[int] = []
    async with backend.subscription("orders", "g", lease=timedelta(seconds=30)) as subscription:
        with anyio.fail_after(60):
            while len(numbers) < ROWS:
                found = await subscription.receive(ROWS, max_bytes=1 << 26, wait=timedelta(seconds=1))
                numbers += [Order.model_validate_json(one.message.body).number for one in found]
    assert sorted(numbers) == list(range(ROWS))


async def _waiting(store: SqlOutboxStore, at_most: int) -> bool:
    return (await store.status()).waiting <= at_most
