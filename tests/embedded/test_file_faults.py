"""What can be wrong with a file or its disk: each a clear error that names it, and nothing lost."""

from __future__ import annotations

import os
import sqlite3
import threading
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.embedded.errors import failure_of
from reliamq.spi import (
    Ack,
    BrokerUnavailable,
    ConfigurationError,
    Confirmation,
    Message,
    Publisher,
    Rejection,
    RejectionReason,
)

from .conftest import LEASE, declare, message, publish, receive, soon, texts, topic

pytestmark = pytest.mark.anyio


async def open_it(url: str) -> None:
    async with EmbeddedBackend(url).publisher():
        pytest.fail("it was opened")


# --- full ------------------------------------------------------------------------------------------------------------


async def fill(publisher: Publisher) -> tuple[int, str]:
    """Publish until not even a small message fits; how many were confirmed, and what the broker said then."""
    confirmed, _ = await fill_with(publisher, 10, 5_000)
    more, said = await fill_with(publisher, 1, 20)
    return confirmed + more, said


async def fill_with(publisher: Publisher, batch: int, size: int) -> tuple[int, str]:
    confirmed = 0
    for _ in range(1_000):
        outcomes = await publisher.send([message("x" * size, str(n)) for n in range(batch)], deadline=soon())
        kinds = {type(outcome) for outcome in outcomes}
        if kinds == {Rejection}:
            assert {one.reason for one in outcomes if isinstance(one, Rejection)} == {RejectionReason.STORAGE_FULL}
            return confirmed, str(outcomes[0])
        assert kinds == {Confirmation}
        confirmed += len(outcomes)
    raise AssertionError("it never got full")


async def test_a_full_broker_rejects_and_keeps_what_it_confirmed_and_can_be_emptied(file_url: str) -> None:
    backend = EmbeddedBackend(file_url, {"max_bytes": 1_000_000})
    await declare(backend, topic(retention=timedelta()))
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        confirmed, said = await fill(publisher)
        assert confirmed >= 100
        assert "broker.db" in said
        assert "max_bytes" in said
        held = await receive(member, confirmed + 1)
        assert len(held) == confirmed
        assert list(await member.settle([Ack(delivery) for delivery in held])) == []
        await publish_at_last(publisher, message("after"))  # retention frees the pages, a second later
        assert texts(await receive(member)) == ["after"]


async def publish_at_last(publisher: Publisher, one: Message) -> None:
    for _ in range(500):
        (outcome,) = await publisher.send([one], deadline=soon())
        if isinstance(outcome, Confirmation):
            return
        await anyio.sleep(0.05)
    raise AssertionError(f"still full: {outcome}")


async def test_on_a_full_broker_a_rejected_batch_takes_no_neighbour_with_it(file_url: str) -> None:
    """An acknowledgement in the same group commit as a publish that does not fit is committed all the same."""
    backend = EmbeddedBackend(file_url, {"max_bytes": 1_000_000})
    await declare(backend)
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await fill(publisher)
        deliveries = await receive(member, 20)
        late: list[object] = []
        rejected: list[object] = []

        async def settle() -> None:
            late.extend(await member.settle([Ack(delivery) for delivery in deliveries]))

        async def send() -> None:
            rejected.extend(await publisher.send([message("x" * 500_000)], deadline=soon()))

        may_go_on = threading.Event()
        backend._database.write_later(lambda connection: may_go_on.wait(20), wakes=frozenset())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            tasks.start_soon(settle)
            tasks.start_soon(send)
            await anyio.wait_all_tasks_blocked()
            may_go_on.set()
        assert late == []
        assert [type(outcome) for outcome in rejected] == [Rejection, Rejection]


# --- not ours --------------------------------------------------------------------------------------------------------


async def test_a_file_that_is_not_a_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes, which are precious\n" * 100)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"notes\.txt.*not a (SQLite )?database"):
        await open_it(f"embedded:///{path}")
    assert path.read_bytes() == before


async def test_another_applications_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    shop = sqlite3.connect(path)
    shop.execute("CREATE TABLE customers (name TEXT)")
    shop.commit()
    shop.close()
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"shop\.db.*another application"):
        await open_it(f"embedded:///{path}")
    assert path.read_bytes() == before


async def test_a_file_of_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    connection = sqlite3.connect(tmp_path / "broker.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = (tmp_path / "broker.db").read_bytes()
    with pytest.raises(ConfigurationError, match=r"broker\.db.*version 99.*newer"):
        await open_it(f"embedded:///{tmp_path}/broker.db")
    assert (tmp_path / "broker.db").read_bytes() == before


async def test_a_damaged_file_is_told_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "broker.db"
    backend = EmbeddedBackend(f"embedded:///{path}")
    await declare(backend)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(BrokerUnavailable, match=r"broker\.db.*damaged"):
        await declare(backend)


# --- not writable ----------------------------------------------------------------------------------------------------


async def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"missing/broker\.db.*folder must exist"):
        await open_it(f"embedded:///{tmp_path}/missing/broker.db")
    assert os.listdir(tmp_path) == []


async def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BrokerUnavailable, match=r"file/broker\.db"):
        await open_it(f"embedded:///{tmp_path}/file/broker.db")


async def test_a_path_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BrokerUnavailable, match=r"folder.*cannot be opened"):
        await open_it(f"embedded:///{tmp_path}/folder")


async def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    """/proc is read-only for root as well, whom file modes do not bind."""
    folder = Path("/proc/self")
    if os.getuid() != 0:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
    with pytest.raises(BrokerUnavailable, match=r"broker\.db.*writable"):
        await open_it(f"embedded:///{folder}/broker.db")


async def test_a_folder_that_appears_later_is_used_without_a_restart(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/later/broker.db")
    with pytest.raises(BrokerUnavailable):
        await declare(backend)
    (tmp_path / "later").mkdir()
    await declare(backend)


async def test_a_file_that_is_deleted_under_a_running_broker_takes_no_more_messages(tmp_path: Path) -> None:
    """SQLite itself would go on writing into the deleted file and lose everything on closing."""
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    async with backend.publisher() as publisher:
        await publish(publisher, message("kept"))
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)
        with pytest.raises(BrokerUnavailable, match=r"broker\.db.*deleted or replaced"):
            await publisher.send([message("refused")], deadline=soon())
        outcomes = await publisher.send([message("nobody declared")], deadline=soon())
        assert [one.reason for one in outcomes if isinstance(one, Rejection)] == [RejectionReason.UNROUTABLE]
        await declare(backend)
        await publish(publisher, message("into the new file"))


async def test_an_old_sqlite_is_refused_by_version(monkeypatch: pytest.MonkeyPatch, file_url: str) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.34.1")
    with pytest.raises(ConfigurationError, match=r"SQLite is 3\.34\.1.*3\.35"):
        await open_it(file_url)


# --- which failures are certain --------------------------------------------------------------------------------------


def sqlite_failure(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorcode = code
    return error


IOERR_FSYNC = sqlite3.SQLITE_IOERR | (4 << 8)


@pytest.mark.parametrize(
    ("code", "committing", "reason"),
    [
        (sqlite3.SQLITE_FULL, False, RejectionReason.STORAGE_FULL),
        (sqlite3.SQLITE_FULL, True, RejectionReason.STORAGE_FULL),
        (sqlite3.SQLITE_BUSY, False, RejectionReason.UNAVAILABLE),
        (sqlite3.SQLITE_BUSY, True, RejectionReason.UNAVAILABLE),
        (IOERR_FSYNC, False, RejectionReason.UNAVAILABLE),
        (IOERR_FSYNC, True, None),
        (sqlite3.SQLITE_CORRUPT, True, None),
        (sqlite3.SQLITE_READONLY, False, RejectionReason.UNAVAILABLE),
    ],
)
async def test_only_a_failure_inside_the_commit_leaves_a_doubt(
    code: int, committing: bool, reason: RejectionReason | None
) -> None:
    failure = failure_of(sqlite_failure(code), "/data/broker.db", committing=committing)
    assert failure.reason is reason
    assert "/data/broker.db" in failure.detail


async def test_a_full_disk_below_sqlite_is_told_as_full() -> None:
    failure = failure_of(OSError(28, "No space left on device"), "/data/broker.db", committing=False)
    assert failure.reason is RejectionReason.STORAGE_FULL
