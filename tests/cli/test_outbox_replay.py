"""``reliamq outbox replay``: what is shown, asked and done, and what is said when it cannot be (O7)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from pydantic import BaseModel
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from reliamq import outbox
from reliamq.database import now_seconds, open_engine
from reliamq.outbox import SentMessage, SqlOutboxStore
from reliamq.topics import Topic
from tests.cli.conftest import Run

pytestmark = pytest.mark.usefixtures("keeping")
DAY = timedelta(days=1)


class Order(BaseModel):
    number: int
    account: str = "ada"


orders = Topic("orders", Order, key=lambda order: order.account)
letters = Topic("letters", Order)
Sent = Callable[..., None]


@pytest.fixture
def keeping(folder: Path) -> None:
    """The settings say that sent rows are kept for a day."""
    settings = folder / "reliamq.toml"
    settings.write_text(settings.read_text() + '[outbox]\nkeep = "1d"\n')


@pytest.fixture
def sent(folder: Path) -> Sent:
    """Lets messages of a topic have been sent so many hours ago."""

    def sent(topic: Topic[Order], *hours: float) -> None:
        anyio.run(_send, f"sqlite:///{folder}/database.db", topic, hours)

    return sent


async def _send(url: str, topic: Topic[Order], hours: Sequence[float]) -> None:
    async with open_engine(url) as engine:
        await outbox.create_tables_async(engine, keep=True)
        store = SqlOutboxStore(engine, keep=DAY)
        for number, ago in enumerate(hours):
            async with AsyncSession(engine) as session, session.begin():
                message_id = outbox.add(session, topic, Order(number=number))
            await store.settle("test", confirmed=await store.claim("test", limit=1, lease=DAY), rejected=[])
            async with engine.begin() as connection:
                it = update(SentMessage).where(SentMessage.message_id == message_id)
                await connection.execute(it.values(sent_at=now_seconds() - ago * 3600))


def status(run: Run) -> dict[str, object]:
    done = run("outbox", "status", "--app", "orders:app", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_dry_run_shows_what_would_be_sent_and_changes_nothing(run: Run, sent: Sent) -> None:
    sent(orders, 3, 1, 0.5)
    sent(letters, 1)

    done = run("outbox", "replay", "--since", "2h", "--dry-run", "--app", "orders:app")

    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert first.split("\t")[:2] == ["letters", "1"]
    assert second.split("\t")[:2] == ["orders", "2"]
    ages = [datetime.now(UTC) - datetime.fromisoformat(written) for written in second.split("\t")[2:]]
    assert [round(age.total_seconds() / 3600, 1) for age in ages] == [1.0, 0.5]
    assert last == "3 would be replayed"
    assert done.stderr == ""
    assert status(run)["kept"] == 4


def test_it_asks_before_it_does_anything(run: Run, sent: Sent) -> None:
    sent(orders, 1)

    refused = run("outbox", "replay", "--since", "2h", "--app", "orders:app", input="n\n")
    nobody = run("outbox", "replay", "--since", "2h", "--app", "orders:app", input="")
    untouched = status(run)
    agreed = run("outbox", "replay", "--since", "2h", "--app", "orders:app", input="y\n")

    assert (refused.returncode, nobody.returncode, agreed.returncode) == (1, 1, 0)
    assert "Send 1 rows again? [y/N]" in agreed.stdout
    assert agreed.stdout.endswith("1 replayed\n")
    assert (untouched["waiting"], untouched["kept"]) == (0, 1)
    assert (status(run)["waiting"], status(run)["kept"]) == (1, 0)


def test_a_moment_an_end_and_a_topic_narrow_it(run: Run, sent: Sent) -> None:
    sent(orders, 5, 3, 1)
    sent(letters, 3)
    since = (datetime.now(UTC) - timedelta(hours=4)).isoformat()

    done = run(
        "outbox", "replay", "--since", since, "--until", "2h", "--topic", "orders", "--yes", "--app", "orders:app"
    )

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 replayed"), done.stderr
    assert (status(run)["waiting"], status(run)["kept"]) == (1, 3)


def test_the_status_says_how_many_are_kept_and_since_when(run: Run, sent: Sent) -> None:
    sent(orders, 3, 1)

    said = run("outbox", "status", "--app", "orders:app").stdout

    assert said.startswith("0 waiting; 0 parked; 2 sent ones kept, since 20")
    since = datetime.fromisoformat(str(status(run)["kept_since"]))
    assert round((datetime.now(UTC) - since).total_seconds() / 3600, 1) == 3.0


def test_a_window_that_begins_before_rows_are_kept_says_from_when_they_are(run: Run, sent: Sent) -> None:
    sent(orders, 20, 1)

    done = run("outbox", "replay", "--since", "3d", "--dry-run", "--app", "orders:app")

    assert done.stdout.endswith("2 would be replayed\n"), done.stderr
    gone, oldest = done.stderr.splitlines()
    day_ago, twenty = (datetime.now(UTC) - timedelta(hours=hours) for hours in (24, 20))
    assert gone.startswith(f"reliamq: what was sent before {day_ago:%Y-%m-%dT%H:}")
    assert gone.endswith("is gone (outbox.keep)")
    assert oldest.startswith(f"reliamq: the oldest row that is kept was sent at {twenty:%Y-%m-%dT%H:}")


def test_nothing_in_the_window_is_said_without_asking(run: Run, sent: Sent) -> None:
    sent(orders)  # which makes the tables
    empty = run("outbox", "replay", "--since", "2h", "--app", "orders:app")
    sent(orders, 5)
    outside = run("outbox", "replay", "--since", "2h", "--topic", "orders", "--app", "orders:app")

    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "0 replayed\n", "reliamq: no sent row is kept\n")
    assert (outside.returncode, outside.stdout, outside.stderr) == (0, "0 replayed\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--since", "yesterday"], "--since yesterday: must be how long ago, such as 2h, or a moment, such as 2026-"),
        (["--since", "10:00"], "--since 10:00: must be how long ago"),
        (["--since", "2026-11-25T10:00:00"], "a moment needs its time zone, such as 2026-11-25T10:00:00Z"),
        (["--since", "2h", "--until", "0s"], "--until 0s: must be in the past"),
        (["--since", "-PT2H"], "--since -PT2H: must be in the past"),
        (["--since", "2h", "--topic", "oders"], "the application has no topic 'oders'; it has orders"),
        ([], "--since"),
    ],
)
def test_a_wrong_argument_is_named(run: Run, sent: Sent, arguments: list[str], said: str) -> None:
    sent(orders, 1)

    done = run("outbox", "replay", *arguments, "--app", "orders:app")

    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_where_rows_are_not_kept_it_says_how_to_keep_them(run: Run, sent: Sent, folder: Path) -> None:
    sent(orders, 1)
    settings = folder / "reliamq.toml"
    settings.write_text(settings.read_text().partition("[outbox]")[0])

    done = run("outbox", "replay", "--since", "2h", "--app", "orders:app")

    assert done.returncode == 2
    assert "sent rows are not kept, so there is nothing to send again; set outbox.keep" in done.stderr


def test_an_older_database_is_told_what_it_lacks_until_the_application_was_started(run: Run, folder: Path) -> None:
    async def older() -> None:
        async with open_engine(f"sqlite:///{folder}/database.db") as engine:
            await outbox.create_tables_async(engine)

    anyio.run(older)
    (folder / "one.ndjson").write_text('{"number": 1}\n')

    before = run("outbox", "replay", "--since", "2h", "--app", "orders:app")
    run("publish", "orders", "--app", "orders:app", "--file", "one.ndjson")  # opens it
    after = run("outbox", "replay", "--since", "2h", "--app", "orders:app")

    assert (before.returncode, after.returncode) == (2, 0)
    assert "outbox.keep is set, but the database has no table reliamq_outbox_sent and no" in before.stderr
