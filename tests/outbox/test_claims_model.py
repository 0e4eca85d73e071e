"""Claims against a model: whatever writers, relays, verdicts, lost leases and replays do, a key keeps its order (O3,
O5, O7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from sqlalchemy import delete, update
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq import outbox
from reliamq.database import open_engine
from reliamq.outbox import OutboxMessage, SentMessage, SqlOutboxStore
from reliamq.outbox.table import OutboxLease
from reliamq.spi import OutboxRow, Rejection, RejectionReason

from .conftest import Order, add

MAX_ATTEMPTS = 2
LEASE = timedelta(hours=1)
KEYS, RELAYS = "abcd", ("one", "two", "three")
Step = tuple[Any, ...]

own_steps = (
    st.tuples(st.just("add"), st.sampled_from(KEYS)),
    st.tuples(st.just("claim"), st.sampled_from(RELAYS), st.integers(1, 6)),
    st.tuples(st.just("settle"), st.sampled_from(RELAYS), st.lists(st.sampled_from("cccrtd"), min_size=1)),
    st.tuples(st.just("expire"), st.sampled_from(RELAYS)),
    st.tuples(st.just("due")),
)
steps = st.lists(st.one_of(*own_steps), min_size=8, max_size=30)
steps_with_replays = st.lists(st.one_of(*own_steps, st.tuples(st.just("replay"))), min_size=8, max_size=30)


@dataclass
class Row:
    number: int
    attempts: int = 0
    waits_for_retry: bool = False


@dataclass
class Model:
    """waiting: each key's rows, in order.  hands: what each relay claimed last.  live: whose leases still hold.

    sent: each key's rows that are kept; None: they are not.  current: relays whose claims are from after the last
    replay.
    """

    waiting: dict[str, list[Row]] = field(default_factory=lambda: {key: [] for key in KEYS})
    hands: dict[str, list[OutboxRow]] = field(default_factory=lambda: {relay: [] for relay in RELAYS})
    live: set[str] = field(default_factory=set)
    added: int = 0
    sent: dict[str, list[Row]] | None = None
    current: set[str] = field(default_factory=set)

    def sendable(self) -> list[str]:
        return [key for key, rows in self.waiting.items() if rows and not rows[0].waits_for_retry]

    def row(self, claimed: OutboxRow) -> Row | None:
        order = order_of(claimed)
        return next((row for row in self.waiting[order.account] if row.number == order.number), None)

    def check_claim(self, relay: str, claimed: Sequence[OutboxRow]) -> None:
        by_key: dict[str, list[int]] = {}
        for one in claimed:
            by_key.setdefault(order_of(one).account, []).append(order_of(one).number)
        for key, numbers in by_key.items():
            assert numbers == [row.number for row in self.waiting[key]][: len(numbers)]
            assert not any(row.waits_for_retry for row in self.waiting[key][: len(numbers)])
            for other in self.live - {relay}:
                assert key not in {order_of(one).account for one in self.hands[other]}
        if self.sendable() and not self.live - {relay}:
            assert claimed

    def judge(self, relay: str, one: OutboxRow, verdict: str) -> None:
        row = self.row(one)
        if row is None or (verdict == "c" and self.sent is not None and relay not in self.current):
            return
        rows = self.waiting[order_of(one).account]
        if verdict == "c":
            rows.remove(row)
            if self.sent is not None:
                self.sent[order_of(one).account].append(row)
        elif verdict == "r":
            row.attempts = one.attempts + 1
            row.waits_for_retry = row.attempts < MAX_ATTEMPTS
            if not row.waits_for_retry:
                rows.remove(row)  # parked

    def replay(self) -> int:
        """Sent rows wait again, each in its place."""
        assert self.sent is not None
        again = {key: [Row(row.number) for row in rows] for key, rows in self.sent.items()}
        for key, rows in again.items():
            self.waiting[key] = sorted(self.waiting[key] + rows, key=lambda row: row.number)
            self.sent[key] = []
        self.current.clear()
        return sum(map(len, again.values()))


def order_of(one: OutboxRow) -> Order:
    return Order.model_validate_json(one.message.body)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/app.db"


@given(steps=steps)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_relays_do_claims_are_prefixes_of_keys_that_no_other_live_relay_holds(
    url: str, steps: list[Step]
) -> None:
    anyio.run(_play, url, steps, timedelta(0))


@given(steps=steps_with_replays)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_relays_do_a_replay_brings_back_each_sent_row_in_its_place(url: str, steps: list[Step]) -> None:
    anyio.run(_play, url, steps, LEASE)


async def _play(url: str, steps: list[Step], keep: timedelta) -> None:
    model = Model(sent={key: [] for key in KEYS} if keep else None)
    async with open_engine(url) as engine:
        await outbox.create_tables_async(engine, keep=True)
        await _clear(engine)
        store = SqlOutboxStore(engine, max_attempts=MAX_ATTEMPTS, keep=keep)
        for kind, *arguments in steps:
            await PLAYS[kind](engine, store, model, *arguments)
        await _finish(engine, store, model)


async def _add(engine: AsyncEngine, _store: SqlOutboxStore, model: Model, key: str) -> None:
    model.added += 1
    await add(engine, (key, model.added))
    model.waiting[key].append(Row(model.added))


async def _claim(_engine: AsyncEngine, store: SqlOutboxStore, model: Model, relay: str, limit: int) -> None:
    claimed = list(await store.claim(relay, limit=limit, lease=LEASE))
    assert len(claimed) <= limit
    model.check_claim(relay, claimed)
    model.hands[relay] = claimed
    model.current.add(relay)
    if claimed:
        model.live.add(relay)


async def _settle(
    _engine: AsyncEngine, store: SqlOutboxStore, model: Model, relay: str, verdicts: Sequence[str]
) -> None:
    """A relay reports, perhaps too late; of each key it sent up to its first failure."""
    confirmed, rejected, stopped = [], [], set()
    for number, one in enumerate(model.hands[relay]):
        key, verdict = one.message.key, verdicts[number % len(verdicts)]
        if key in stopped:
            continue
        if verdict == "c":
            confirmed.append(one)
        else:
            stopped.add(key)
        if verdict in "rt":
            reason = RejectionReason.INVALID if verdict == "r" else RejectionReason.UNAVAILABLE
            rejected.append((one, Rejection(one.message.id, reason, "no")))
        model.judge(relay, one, verdict)
    await store.settle(relay, confirmed=confirmed, rejected=rejected)
    model.hands[relay] = []
    model.live.discard(relay)


async def _expire(engine: AsyncEngine, _store: SqlOutboxStore, model: Model, relay: str) -> None:
    """The relay stands still for longer than its lease; what it has in hand it may still settle."""
    async with engine.begin() as connection:
        await connection.execute(update(OutboxLease).where(OutboxLease.owner == relay).values(until=0.0))
    model.live.discard(relay)


async def _due(engine: AsyncEngine, _store: SqlOutboxStore, model: Model) -> None:
    async with engine.begin() as connection:
        await connection.execute(update(OutboxMessage).values(available_at=0.0))
    for rows in model.waiting.values():
        for row in rows:
            row.waits_for_retry = False


async def _replay(_engine: AsyncEngine, store: SqlOutboxStore, model: Model) -> None:
    assert await store.replay(since=LEASE) == model.replay()


PLAYS = {"add": _add, "claim": _claim, "settle": _settle, "expire": _expire, "due": _due, "replay": _replay}


async def _finish(engine: AsyncEngine, store: SqlOutboxStore, model: Model) -> None:
    """In the end everything that was neither confirmed nor parked goes, and nothing else; what was, is kept."""
    for relay in RELAYS:
        await _expire(engine, store, model, relay)
    await _due(engine, store, model)
    left = {key: [row.number for row in rows] for key, rows in model.waiting.items()}
    sent: dict[str, list[int]] = {key: [] for key in KEYS}
    while rows := await store.claim("last", limit=5, lease=LEASE):
        for one in rows:
            sent[order_of(one).account].append(order_of(one).number)
        await store.settle("last", confirmed=rows, rejected=[])
    assert sent == left
    if model.sent is not None:
        once_sent = sum(map(len, model.sent.values())) + sum(map(len, left.values()))
        assert await store.replay(since=LEASE) == once_sent


async def _clear(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(delete(OutboxMessage))
        await connection.execute(delete(SentMessage))
        await connection.execute(update(OutboxLease).values(owner=None, until=0.0))
