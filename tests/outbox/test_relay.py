"""What relays promise: gone after the confirm, order in a key, parking, patience with an outage (O2–O5)."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from sqlalchemy import event, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from reliamq import ConfigurationError
from reliamq.backends import open_backend
from reliamq.database import now_seconds, open_engine
from reliamq.outbox import OutboxMessage, Relay, SqlOutboxStore
from reliamq.outbox.resting import Resting
from reliamq.outbox.table import OutboxLease, columns_of
from reliamq.spi import (
    BrokerUnavailable,
    Confirmation,
    Durability,
    GroupSpec,
    InDoubt,
    Message,
    OutboxRow,
    Outcome,
    Rejection,
    RejectionReason,
    TopicSpec,
)

from .conftest import Order, Recorder, add, analyse, drain, every_driver, firsts, relaying, until

pytestmark = pytest.mark.anyio
LEASE = timedelta(seconds=30)


def number_of(message: Message) -> int:
    return Order.model_validate_json(message.body).number


def rejection(message: Message, reason: RejectionReason = RejectionReason.INVALID) -> Rejection:
    return Rejection(message.id, reason, "the test says so")


async def make_due(engine: AsyncEngine) -> None:
    """Let what waits for its retry wait no longer."""
    async with engine.begin() as connection:
        await connection.execute(update(OutboxMessage).values(available_at=0.0))


@pytest.mark.parametrize(
    ("argument", "value"), [("batch", 0), ("batch_bytes", -1), ("lease", timedelta(0)), ("poll", 0.05)]
)
def test_a_relay_that_could_never_relay_is_refused_by_the_name_of_its_argument(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"relay: {argument}"):
        Relay(SqlOutboxStore(create_async_engine("sqlite+aiosqlite://")), Recorder(), **{argument: value})


# --- confirms ---------------------------------------------------------------------------------------------------------


async def test_rows_arrive_at_a_broker_unchanged_and_in_order_and_leave_the_table(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    added = await add(engine, *(("ab"[number % 2], number) for number in range(40)))
    backend = open_backend(f"memory://outbox-{time.monotonic_ns()}")
    async with (
        backend.storage() as storage,
        backend.publisher() as publisher,
    ):
        spec = TopicSpec("orders", (GroupSpec("g"),), durability=Durability.DEVELOPMENT)
        assert await storage.declare([spec]) == []
        await drain(store, publisher)
        async with backend.subscription("orders", "g", lease=LEASE) as subscription:
            got = [
                delivery.message
                for delivery in await subscription.receive(100, max_bytes=1 << 20, wait=timedelta(seconds=5))
            ]

    assert sorted(one.id for one in got) == sorted(added)
    for account in (b"a", b"b"):
        sequences = [one.sequence or 0 for one in got if one.key == account]
        assert sequences == sorted(set(sequences))
    assert {one.type for one in got} == {"Order"}
    assert (await store.status()).waiting == 0


async def test_a_row_stays_while_its_message_is_in_doubt_and_goes_with_the_same_id(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    (message_id,) = await add(engine, ("a", 1))
    seen: list[str] = []

    def doubtful_twice(message: Message) -> Outcome | None:
        seen.append(message.id)
        return InDoubt(message.id, "the test says so") if len(seen) < 3 else None

    await drain(store, Recorder(doubtful_twice))

    assert seen == [message_id] * 3


async def test_a_confirm_counts_although_the_claim_was_lost_meanwhile(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    await add(engine, ("a", 1), ("a", 2))
    late = await store.claim("late", limit=10, lease=timedelta(0))
    assert [number_of(one.message) for one in late] == [1, 2]
    (first, second) = await store.claim("heir", limit=10, lease=LEASE)

    await store.settle("late", confirmed=[late[0]], rejected=[])

    assert (await store.status()).waiting == 1
    assert await store.claim("third", limit=10, lease=LEASE) == []  # the heir's claim was not ended by it
    await store.settle("heir", confirmed=[first, second], rejected=[])
    assert (await store.status()).waiting == 0


# --- order and sharing ------------------------------------------------------------------------------------------------


@every_driver
async def test_relays_share_the_work_and_keep_each_keys_order(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    accounts = [f"account-{number}" for number in range(24)]
    for start in range(0, 10, 5):
        await add(engine, *((account, number) for number in range(start, start + 5) for account in accounts))
    together: list[Message] = []
    sending = [anyio.Event() for _ in range(3)]

    class Sharing(Recorder):
        """Goes on when all relays have something to send."""

        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            sending[recorders.index(self)].set()
            for one in sending:
                await one.wait()
            return await super().send(batch, deadline=deadline, chained=chained)

    recorders = [Sharing() for _ in range(3)]
    for recorder in recorders:
        recorder.stored = together  # one broker

    await drain(store, *recorders, batch=20, lease=60)

    whole = Recorder()
    whole.stored = together
    assert {account: whole.numbers(account) for account in accounts} == {
        account: list(range(10)) for account in accounts
    }


async def test_leases_shorter_than_a_send_repeat_messages_but_lose_no_order(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    await add(engine, *(("abc"[number % 3], number) for number in range(30)))
    together: list[Message] = []

    class Slow(Recorder):
        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            await anyio.sleep(0.03)
            together.extend(batch)
            return [Confirmation(message.id) for message in batch]

    await drain(store, Slow(), Slow(), lease=0.4, batch=9)

    whole = Recorder()
    whole.stored = together
    for offset, account in enumerate("abc"):
        assert firsts(whole.numbers(account)) == list(range(offset, 30, 3))


async def test_a_keys_first_rejection_holds_its_key_and_no_other(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    await add(engine, *((account, number) for number in range(3) for account in ("bad", "good", "fine")))
    recorder = Recorder(
        lambda message: rejection(message) if message.key == b"bad" and number_of(message) == 1 else None
    )

    async def others_are_done() -> bool:
        return (await store.status()).waiting == 2

    async with relaying(store, recorder):
        await until(others_are_done)

    assert recorder.numbers("bad") == [0]
    assert recorder.numbers("good") == recorder.numbers("fine") == [0, 1, 2]
    assert await store.claim("later", limit=10, lease=LEASE) == []  # row 1 waits for its retry, row 2 for row 1


@every_driver
async def test_a_thousand_keys_that_wait_for_their_retry_hold_up_no_other(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    await add(engine, *((f"bad-{number}", 0) for number in range(1_000)))
    async with engine.begin() as connection:
        await connection.execute(update(OutboxMessage).values(available_at=now_seconds() + 300))
    await add(engine, *((f"bad-{number}", 1) for number in range(1_000)), ("good", 1))

    claimed = []
    while rows := await store.claim("relay", limit=100, lease=LEASE):
        claimed.extend(rows)
        await store.settle("relay", confirmed=rows, rejected=[])

    assert [one.message.key for one in claimed] == [b"good"]


async def test_a_relay_that_finds_nothing_due_takes_no_lease_and_writes_nothing(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    await add(engine, ("a", 1))
    async with engine.begin() as connection:
        await connection.execute(update(OutboxMessage).values(available_at=now_seconds() + 300))
    await add(engine, ("a", 2))
    statements = _count_statements(engine)

    assert await store.claim("relay", limit=10, lease=LEASE) == []

    assert statements["UPDATE"] == 0
    async with engine.connect() as connection:
        assert await connection.scalar(select(func.count(OutboxLease.owner))) == 0


def _count_statements(engine: AsyncEngine) -> Counter[str]:
    """Statements by their first word, from now on."""
    counted: Counter[str] = Counter()

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        counted[statement.split(None, 1)[0]] += 1

    return counted


@pytest.mark.parametrize("resting", [(), ("unordered", "others")])
async def test_a_claim_goes_by_its_index_also_when_one_bucket_holds_everything(
    engine: AsyncEngine, store: SqlOutboxStore, resting: Sequence[str]
) -> None:
    await add(engine, *(("hot", number) for number in range(3_000)))
    asked: list[tuple[str, Any]] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith(("SELECT", "WITH")):
            asked.append((statement, parameters))

    await analyse(engine, "reliamq_outbox")  # the planner knows now what is there
    assert len(await store.claim("relay", limit=500, lease=LEASE, resting=resting)) == 500

    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    planned = 0
    async with engine.connect() as connection:
        for statement, parameters in asked.copy():
            if "reliamq_outbox.bucket" not in statement:  # how the others are planned, who writes
                await connection.exec_driver_sql(statement, parameters)
                continue
            planned += 1
            plan = str((await connection.exec_driver_sql(f"{explain} {statement}", parameters)).all())
            assert "reliamq_outbox_waiting" in plan, plan
            assert "Bitmap" not in plan, plan
    assert planned >= 3  # is there anything, which buckets, which rows


# --- topics that rest -------------------------------------------------------------------------------------------------


async def add_stuck(engine: AsyncEngine, rows: int) -> None:
    """Rows of another topic, with the keys that orders have too."""
    messages = [
        Message("stuck", b"", f"stuck-{n}", "T", "s", datetime.now(UTC), f"account-{n % 40}".encode())
        for n in range(rows)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(OutboxMessage), [columns_of(one) for one in messages])


@every_driver
async def test_of_a_topic_that_rests_no_row_is_claimed(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    await add_stuck(engine, 100)
    one, two = await add(engine, ("account-1", 1), ("account-2", 2))

    claimed = list[str]()
    while rows := await store.claim("relay", limit=10, lease=LEASE, resting=["stuck", "unknown"]):
        claimed += [row.message.id for row in rows]
        await store.settle("relay", confirmed=rows, rejected=[])

    assert sorted(claimed) == sorted([one, two])
    assert len(await store.claim("relay", limit=10, lease=LEASE)) == 10


@pytest.mark.parametrize("outage", ["transient", "doubt"])
async def test_a_topic_that_takes_nothing_holds_up_no_other_however_many_rows_wait_for_it(
    engine: AsyncEngine, store: SqlOutboxStore, outage: str
) -> None:
    """A partition without a leader, a queue without a majority."""
    back = False

    def judge(message: Message) -> Outcome | None:
        if back or message.topic != "stuck":
            return None
        if outage == "doubt":
            return InDoubt(message.id, "the test says so")
        return rejection(message, RejectionReason.UNAVAILABLE)

    recorder = Recorder(judge)
    await add_stuck(engine, 1_000)
    async with relaying(store, recorder, batch=50):
        await add(engine, *((f"account-{number % 40}", number) for number in range(200)))
        await until(lambda: _waiting(store, 1_000))
        assert {one.topic for one in recorder.stored} == {"orders"}
        back = True
        await until(lambda: _waiting(store, 0))

    assert len(recorder.stored) == 1_200
    stuck = [one for one in recorder.stored if one.topic == "stuck"]
    for key in {one.key for one in stuck}:
        numbers = [int(one.id.removeprefix("stuck-")) for one in stuck if one.key == key]
        assert numbers == sorted(numbers)


async def test_a_topic_rests_twice_as_long_each_time_until_it_takes_something() -> None:
    resting, rests = Resting(), list[float]()
    for _ in range(8):
        resting.judge({"a", "b"}, took={"b"})
        rests.append(resting._rests["a"][0] - time.monotonic())
        assert resting.topics() == ["a"]

    assert rests == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5], abs=0.05)
    resting.judge({"a"}, took={"a"})
    assert (resting.topics(), resting.seconds()) == ([], 0)


async def test_looking_past_a_topic_that_rests_takes_a_twentieth_of_the_time_if_there_is_nothing_to_find() -> None:
    resting = Resting()
    resting.looked(0.1, found=False)
    assert resting.may_look()
    for _ in range(7):
        resting.judge({"a"}, took=set())
    assert (resting.may_look(), resting.seconds()) == (False, pytest.approx(1.9, abs=0.05))
    resting.looked(0.01, found=True)
    await anyio.sleep(0.02)
    assert resting.may_look()
    resting.looked(0.001, found=False)
    assert (resting.may_look(), resting.seconds()) == (False, pytest.approx(1.0, abs=0.05))


# --- sizes ------------------------------------------------------------------------------------------------------------


@every_driver
async def test_the_row_that_reaches_the_bytes_of_a_claim_is_its_last(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    bodies = [b"x" * 400, b"x" * 600, b"x" * 5_000, b"x"]
    messages = [Message("t", body, f"m-{n}", "T", "s", datetime.now(UTC), b"k") for n, body in enumerate(bodies)]
    async with engine.begin() as connection:
        await connection.execute(insert(OutboxMessage), [columns_of(one) for one in messages])

    async def claimed(max_bytes: int) -> list[int]:
        rows = await store.claim("one", limit=10, lease=LEASE, max_bytes=max_bytes)
        return [int(row.message.id[2:]) for row in rows]

    assert await claimed(1) == [0]
    assert await claimed(400) == [0]
    assert await claimed(401) == [0, 1]
    assert await claimed(1_001) == [0, 1, 2]
    assert await claimed(6_001) == [0, 1, 2, 3]


@every_driver
async def test_large_rows_are_sent_in_small_claims(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    texts = [f"{number}".zfill(500) for number in range(40)]
    await add(engine, *((text, number) for number, text in enumerate(texts)))
    sizes: list[int] = []
    stop = anyio.Event()

    class Sizes(Recorder):
        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            sizes.append(sum(len(message.body) for message in batch))
            return await super().send(batch, deadline=deadline, chained=chained)

    recorder = Sizes()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Relay(store, recorder, batch=30, batch_bytes=2_000, lease=LEASE).run, stop)
        await until(lambda: _waiting(store, 0))
        stop.set()

    assert sorted(number_of(message) for message in recorder.stored) == list(range(40))
    assert max(sizes) < 2_000 + 600


@every_driver
async def test_large_rows_are_claimed_in_order_and_small_ones_behind_them_by_the_thousand(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    sizes = [50_000] * 40 + [10] * 2_000
    messages = [Message("t", b"x" * size, f"m-{n}", "T", "s", datetime.now(UTC), b"k") for n, size in enumerate(sizes)]
    async with engine.begin() as connection:
        await connection.execute(insert(OutboxMessage), [columns_of(one) for one in messages])
    claims: list[list[int]] = []
    while rows := await store.claim("one", limit=1_000, lease=LEASE, max_bytes=200_000):
        claims.append([int(row.message.id[2:]) for row in rows])
        await store.settle("one", confirmed=rows, rejected=[])

    assert [number for claim in claims for number in claim] == list(range(len(sizes)))
    assert [len(claim) for claim in claims[:10]] == [4] * 10
    assert max(map(len, claims)) > 900


async def test_a_claim_that_is_full_by_its_bytes_has_the_relay_claim_twice_at_a_time(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    await add(engine, *((f"{number}".zfill(500), number) for number in range(40)))
    both, stop = anyio.Event(), anyio.Event()
    claims: list[str] = []

    class Watched(SqlOutboxStore):
        async def claim(self, relay: str, **limits: Any) -> Sequence[OutboxRow]:
            rows = await super().claim(relay, **limits)
            claims.append(relay)
            if len(set(claims)) == 2:
                both.set()
            return rows

    class Slow(Recorder):
        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            if len(claims) > 1:  # not the first, after which the relay knows that there is more
                await both.wait()
            return await super().send(batch, deadline=deadline, chained=chained)

    async with anyio.create_task_group() as tasks:
        relay = Relay(Watched(engine), Slow(), batch=30, batch_bytes=2_000, lease=LEASE, name="one")
        tasks.start_soon(relay.run, stop)
        await until(lambda: _waiting(store, 0))
        stop.set()

    assert set(claims) == {"one", "one/2"}


async def test_outcomes_that_are_too_few_confirm_no_row(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    await add(engine, *(("a", number) for number in range(5)))

    class Short(Recorder):
        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            return (await super().send(batch, deadline=deadline, chained=chained))[1:]

    with pytest.raises(ValueError, match="4 outcomes for 5 messages"):
        await Relay(store, Short(), lease=LEASE).run(anyio.Event())

    assert await _waiting(store, 5)


# --- rejections -------------------------------------------------------------------------------------------------------


@every_driver
async def test_a_rejected_row_counts_waits_is_parked_and_can_be_requeued(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    bad, behind = await add(engine, ("a", 1), ("a", 2))
    recorder = Recorder(lambda message: rejection(message) if message.id == bad else None)

    async def attempts(expected: int) -> bool:
        async with engine.connect() as connection:
            return await connection.scalar(select(func.max(OutboxMessage.attempts))) == expected

    async with relaying(store, recorder):
        await until(lambda: attempts(1))
        status = await store.status()
        assert (status.waiting, status.parked, status.retrying, status.attempts) == (2, 0, 1, 1)
        assert recorder.stored == []
        await make_due(engine)  # instead of the two seconds
        await until(lambda: _waiting(store, 0))

    (parked,) = await store.parked(limit=10)
    assert (parked.row.message.id, parked.row.attempts) == (bad, 2)
    assert "the test says so" in parked.error
    assert abs(parked.parked_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert [one.id for one in recorder.stored] == [behind]  # the key goes on

    recorder.judge = lambda _: None
    assert await store.requeue(["unknown"]) == 0
    assert await store.requeue([bad]) == 1
    await drain(store, recorder)
    assert [one.id for one in recorder.stored] == [behind, bad]
    assert (await store.status()).parked == 0


async def _waiting(store: SqlOutboxStore, expected: int) -> bool:
    return (await store.status()).waiting == expected


async def test_requeueing_all_starts_their_attempts_again(engine: AsyncEngine, store: SqlOutboxStore) -> None:
    await add(engine, *((f"account-{number}", number) for number in range(450)))
    async with engine.begin() as connection:
        await connection.execute(update(OutboxMessage).values(parked_at=now_seconds(), attempts=2, error="no"))
    found = [one.row.message.id for one in await store.parked(limit=1_000)]

    assert await store.requeue(found[:420]) == 420
    assert await store.requeue(None) == 30
    assert (await store.status()).waiting == 450
    assert {one.attempts for one in await store.claim("relay", limit=450, lease=LEASE)} == {0}


async def test_what_is_purged_is_never_sent_and_what_waits_is_left_alone(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    one, two, three, waiting = await add(engine, ("a", 1), ("b", 2), ("c", 3), ("d", 4))
    async with engine.begin() as connection:
        parked = update(OutboxMessage).where(OutboxMessage.message_id.in_([one, two, three]))
        await connection.execute(parked.values(parked_at=now_seconds(), attempts=2, error="no"))

    assert await store.purge([one, waiting, "unknown"]) == 1
    assert [row.row.message.id for row in await store.parked(limit=10)] == [two, three]
    assert await store.purge(None) == 2
    recorder = Recorder()
    await drain(store, recorder)
    assert [message.id for message in recorder.stored] == [waiting]


@pytest.mark.parametrize("outage", ["unavailable", "transient", "doubt"])
async def test_an_outage_burns_no_attempt_and_does_not_spin(
    engine: AsyncEngine, store: SqlOutboxStore, outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    await add(engine, *((f"account-{number}", number) for number in range(100)))
    back = False

    class Away(Recorder):
        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            self.calls += not back
            if outage == "unavailable" and not back:
                raise BrokerUnavailable("memory://", "the test says so")
            return await super().send(batch, deadline=deadline, chained=chained)

    def judge(message: Message) -> Outcome | None:
        if back:
            return None
        if outage == "doubt":
            return InDoubt(message.id, "the test says so")
        return rejection(message, RejectionReason.UNAVAILABLE)

    recorder = Away(judge)
    statements = _count_statements(engine)
    async with relaying(store, recorder):
        await until(lambda: _calls(recorder, 3))
        await anyio.sleep(0.5)  # what is counted is how little happens in a time
        # Pauses of 0.1, 0.2, 0.4, 0.8 … s: a handful of rounds, each of a few statements, and one line of the log.
        rounds = recorder.calls
        assert rounds <= 10
        assert statements["SELECT"] <= 12 * rounds
        assert statements["UPDATE"] <= 6 * rounds
        assert 0 < len(caplog.records) <= rounds
        async with engine.connect() as connection:
            assert await connection.scalar(select(func.max(OutboxMessage.attempts))) == 0
        back = True
        await until(lambda: _waiting(store, 0))

    assert len({one.id for one in recorder.stored}) == 100


@pytest.mark.parametrize("database", ["psycopg"], indirect=True)
async def test_a_retry_that_comes_due_during_a_claim_is_not_overtaken(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    """All that a claim asks about the time is judged by one moment."""
    keys, until = 200, time.monotonic() + 4
    while time.monotonic() < until:
        await add(engine, *((f"a-{key}", number) for number in (1, 2) for key in range(keys)))
        async with engine.begin() as connection:
            first = OutboxMessage.position <= select(func.min(OutboxMessage.position) + keys - 1).scalar_subquery()
            soon = now_seconds() + 0.004 + 0.0005 * (OutboxMessage.position % keys)
            # All in one bucket, which is where many rows that are not due yet are stepped over
            await connection.execute(update(OutboxMessage).values(bucket=1))
            await connection.execute(update(OutboxMessage).where(first).values(available_at=soon))
        sent = defaultdict[bytes | None, list[int]](list)
        while sum(map(len, sent.values())) < 2 * keys:
            rows = await store.claim("one", limit=500, lease=LEASE)
            await store.settle("one", confirmed=rows, rejected=[])
            for one in rows:
                sent[one.message.key].append(number_of(one.message))
        assert all(numbers == [1, 2] for numbers in sent.values())


async def _calls(recorder: Recorder, least: int) -> bool:
    return recorder.calls >= least


async def test_a_database_that_is_away_makes_a_relay_wait_and_not_die(postgresql_url: str) -> None:
    gone = postgresql_url.replace("postgresql:", "postgresql+asyncpg:").replace("host=", "host=/nowhere")
    stop = anyio.Event()
    async with open_engine(gone) as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(Relay(SqlOutboxStore(engine), Recorder()).run, stop)
        with anyio.move_on_after(0.5):
            await stop.wait()  # an error of the relay would end this wait
        stop.set()


# --- time -------------------------------------------------------------------------------------------------------------


async def test_leases_and_retries_go_by_the_databases_clock(
    engine: AsyncEngine, store: SqlOutboxStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """O8"""
    await add(engine, ("a", 1))
    (claimed,) = await store.claim("one", limit=1, lease=LEASE)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this process believes in 1970
    assert await store.claim("two", limit=1, lease=LEASE) == []

    await store.settle("one", confirmed=[], rejected=[(claimed, rejection(claimed.message))])

    async with engine.connect() as connection:
        left = await connection.scalar(select(OutboxMessage.available_at - now_seconds()))
    assert 0 < (left or 0) <= 2


async def test_a_stopping_relay_finishes_its_batch_and_frees_its_claim(
    engine: AsyncEngine, store: SqlOutboxStore
) -> None:
    await add(engine, ("a", 1), ("a", 2))
    sending, stop = anyio.Event(), anyio.Event()

    class Gated(Recorder):
        async def send(self, batch: Sequence[Message], *, deadline: float, chained: bool = False) -> Sequence[Outcome]:
            sending.set()
            await stop.wait()
            return await super().send(batch, deadline=deadline, chained=chained)

    recorder = Gated()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Relay(store, recorder, lease=LEASE).run, stop)
        await sending.wait()
        await add(engine, ("a", 3))
        stop.set()

    assert recorder.numbers("a") == [1, 2]
    assert [number_of(one.message) for one in await store.claim("next", limit=9, lease=LEASE)] == [3]
