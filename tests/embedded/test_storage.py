"""Safe shelter: declaring, retention, dead letters, the audit (S1–S3, C5, C9)."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from reliamq.embedded.audit import file_system_finding
from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import (
    Ack,
    BrokerUnavailable,
    Confirmation,
    DeadLetterRecord,
    Durability,
    Finding,
    Message,
    Rejection,
    RejectionReason,
    Retry,
    Severity,
    Subscription,
    TopicSpec,
)

from .conftest import LEASE, Clock, declare, message, publish, receive, soon, texts, topic

pytestmark = pytest.mark.anyio


async def declared(backend: EmbeddedBackend, *topics: TopicSpec) -> list[Finding]:
    async with backend.storage() as storage:
        return list(await storage.declare(topics))


async def audited(backend: EmbeddedBackend, *topics: TopicSpec) -> list[Finding]:
    async with backend.storage() as storage:
        return list(await storage.audit(topics))


# --- declaring -------------------------------------------------------------------------------------------------------


async def test_declaring_twice_and_from_many_tasks_at_once_is_declaring_once(backend: EmbeddedBackend) -> None:
    spec = topic("orders", "billing", "mail")
    assert await asyncio.gather(*(declared(backend, spec) for _ in range(10))) == [[]] * 10
    assert await audited(backend, spec) == []


async def test_declaring_raises_limits_and_never_lowers_them(backend: EmbeddedBackend) -> None:
    small = topic(retention=timedelta(days=1), max_message_bytes=100)
    large = topic(retention=timedelta(days=2), max_message_bytes=1_000)
    assert await declared(backend, small) == []
    assert await declared(backend, large) == []
    kept = await declared(backend, small)
    assert {(finding.setting, finding.severity) for finding in kept} == {
        ("retention", Severity.NOTE),
        ("max_message_bytes", Severity.NOTE),
    }
    async with backend.publisher() as publisher:
        await publish(publisher, message("x" * 999))


async def test_asking_for_more_durability_than_there_is_is_a_finding_that_loses(url: str) -> None:
    backend = EmbeddedBackend(url)
    asked = topic(durability=Durability.REPLICATED)
    for findings in (await declared(backend, asked), await audited(backend, asked)):
        assert [(one.severity, one.setting, one.required) for one in findings] == [
            (Severity.LOSES, "durability", "replicated")
        ]
    own = topic(durability=backend.capabilities.durability)
    assert await declared(backend, own) == await audited(backend, own) == []


async def test_declaring_nothing_does_nothing(backend: EmbeddedBackend) -> None:
    assert await declared(backend) == []


# --- retention -------------------------------------------------------------------------------------------------------


WORK = topic("work", retention=timedelta())


async def is_kept(backend: EmbeddedBackend, known: Message) -> bool:
    """Whether the file still has it: no contract asks that."""
    (count,) = await backend._database.read(
        lambda connection: connection.execute("SELECT count(*) FROM message WHERE id = ?", (known.id,)).fetchone()
    )
    return bool(count)


async def gone(backend: EmbeddedBackend, known: Message) -> None:
    """Wait until it is removed."""
    for _ in range(1_000):
        if not await is_kept(backend, known):
            return
        await anyio.sleep(0.02)
    raise AssertionError("it was never removed")


async def swept(backend: EmbeddedBackend) -> None:
    """Return when the broker has swept: when a message is gone that was finished just now, in a topic that keeps none.

    A sweep may have been under way, so it takes two.
    """
    async with backend.publisher() as publisher, backend.subscription("work", "g", lease=LEASE) as member:
        for _ in range(2):
            marker = message(topic="work")
            await publish(publisher, marker)
            await finish_all(member)
            await gone(backend, marker)


async def finish_all(member: Subscription) -> None:
    while deliveries := await receive(member):
        assert list(await member.settle([Ack(delivery) for delivery in deliveries])) == []


async def test_a_message_is_removed_when_every_group_has_finished_it_and_its_retention_is_over(
    backend: EmbeddedBackend, clock: Clock
) -> None:
    await declare(backend, topic("orders", "billing", "mail", retention=timedelta(hours=1)), WORK)
    known = message("known", "k")
    async with (
        backend.publisher() as publisher,
        backend.subscription("orders", "billing", lease=LEASE) as billing,
        backend.subscription("orders", "mail", lease=LEASE) as mail,
    ):
        await publish(publisher, known)
        await finish_all(billing)
        clock.advance(7_200)
        await swept(backend)
        assert await is_kept(backend, known), "mail has not finished it"
        await finish_all(mail)
        await swept(backend)
        assert await is_kept(backend, known), "its retention begins when all have finished it"
        clock.advance(3_700)
        await publish(publisher, message("work to do"))
        await gone(backend, known)


@pytest.mark.parametrize("keep_order", [True, False])
async def test_a_message_that_waits_for_its_retry_is_kept_while_its_neighbours_go(
    backend: EmbeddedBackend, clock: Clock, keep_order: bool
) -> None:
    await declare(backend, topic(retention=timedelta()), WORK)
    waiting, neighbour = message("waiting", "k"), message("neighbour", "n")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, waiting, neighbour)
        first, second = await receive(member)
        await member.settle([Retry(first, timedelta(days=30), keep_order=keep_order), Ack(second)])
        await gone(backend, neighbour)
        await swept(backend)
        assert await is_kept(backend, waiting)
        clock.advance(31 * 86_400)
        assert texts(await receive(member)) == ["waiting"]


async def test_what_is_kept_when_a_new_group_comes_is_kept_until_that_group_has_finished_it(
    backend: EmbeddedBackend, clock: Clock
) -> None:
    await declare(backend, topic("orders", "g", retention=timedelta(hours=1)), WORK)
    known = message("known")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        await publish(publisher, known)
        await finish_all(member)
        await swept(backend)
        await declare(backend, topic("orders", "late", retention=timedelta(hours=1)))
        clock.advance(7_200)
        await swept(backend)
        async with backend.subscription("orders", "late", lease=LEASE) as late:
            assert texts(await receive(late)) == ["known"]


async def test_a_message_that_nobody_has_looked_at_is_never_removed(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend, topic(retention=timedelta()), WORK)
    known = message("known")
    async with backend.publisher() as publisher:
        await publish(publisher, known)
        clock.advance(365 * 86_400)
        await swept(backend)
        assert await is_kept(backend, known)
        async with backend.subscription("orders", "g", lease=LEASE) as member:
            assert texts(await receive(member)) == ["known"]


async def test_many_finished_messages_are_removed_in_pieces(backend: EmbeddedBackend, clock: Clock) -> None:
    await declare(backend, topic(retention=timedelta()), WORK)
    last = message("last")
    async with backend.publisher() as publisher, backend.subscription("orders", "g", lease=LEASE) as member:
        for _ in range(10):
            await publish(publisher, *(message("m") for _ in range(1_000)))
        await publish(publisher, last)
        while deliveries := await receive(member, 2_000):
            await member.settle([Ack(delivery) for delivery in deliveries])
        await gone(backend, last)


# --- dead letters ----------------------------------------------------------------------------------------------------


def dead(
    text: str, *, group: str = "g", topic: str = "orders", id: str | None = None, **changes: object
) -> DeadLetterRecord:
    record = DeadLetterRecord(
        message=message(text, "k", topic=topic, id=id, headers={"h": "ü"}),
        group=group,
        handler="apply_order",
        reason="ValueError: no",
        traceback="Traceback …\n  line",
        attempts=3,
        died_at=datetime.now(UTC),
        position="17",
    )
    return replace(record, **changes)  # type: ignore[arg-type]  # fields by name


async def test_dead_letters_are_kept_whole_found_by_what_they_are_and_removed(backend: EmbeddedBackend) -> None:
    records = [dead("1"), dead("2", group="mail"), dead("3", topic="mails"), dead("4")]
    async with backend.dead_letters() as letters:
        outcomes = await letters.add(records, deadline=soon())
        assert outcomes == [Confirmation(record.message.id) for record in records]
        assert await letters.find() == records
        assert await letters.find(topic="orders", group="g") == [records[0], records[3]]
        assert await letters.find(message_id=records[1].message.id) == [records[1]]
        assert await letters.find(limit=2) == records[:2]
        assert await letters.remove(records[:2]) == 2
        assert await letters.remove(records[:2]) == 0
        assert await letters.find() == records[2:]


async def test_adding_a_dead_letter_again_replaces_it(backend: EmbeddedBackend) -> None:
    first = dead("same", id="one")
    again = dead("same", id="one", reason="KeyError: other", attempts=4)
    async with backend.dead_letters() as letters:
        for record in (first, again):
            await letters.add([record], deadline=soon())
        assert await letters.find() == [again]


async def test_dead_letters_outlive_every_process(file_url: str) -> None:
    record = dead("kept")
    async with EmbeddedBackend(file_url).dead_letters() as letters:
        await letters.add([record], deadline=soon())
    async with EmbeddedBackend(file_url).dead_letters() as letters:
        assert await letters.find() == [record]


async def test_a_dead_letter_that_sqlite_cannot_hold_is_rejected_alone(backend: EmbeddedBackend) -> None:
    good, bad = dead("good"), dead("bad", reason="lone surrogate \udcff")
    async with backend.dead_letters() as letters:
        outcomes = await letters.add([bad, good], deadline=soon())
        assert [type(outcome) for outcome in outcomes] == [Rejection, Confirmation]
        assert outcomes[0].reason is RejectionReason.INVALID  # type: ignore[union-attr]
        assert await letters.find() == [good]


# --- the audit -------------------------------------------------------------------------------------------------------


def by_setting(findings: list[Finding]) -> dict[str, Severity]:
    return {finding.setting: finding.severity for finding in findings}


async def test_an_audit_names_what_is_not_declared_or_less_than_asked(backend: EmbeddedBackend) -> None:
    await declare(backend, topic(retention=timedelta(hours=1), max_message_bytes=100))
    findings = await audited(backend, topic("orders", "g", "mail"), topic("missing"))
    assert by_setting(findings) == {
        "retention": Severity.RISKS,
        "max_message_bytes": Severity.NOTE,
        "group mail": Severity.LOSES,
        "topic": Severity.RISKS,
    }
    assert all(finding.why and finding.fix for finding in findings)


async def test_an_audit_of_a_file_that_is_not_there_says_so_and_creates_nothing(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    missing, topic_missing = await audited(backend, topic())
    assert (missing.severity, missing.setting, missing.found) == (Severity.LOSES, "file", "missing")
    assert "await app.declare()" in topic_missing.fix
    assert os.listdir(tmp_path) == []
    assert await declared(backend) == await audited(backend) == []


def set_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()


@pytest.mark.parametrize(
    ("damage", "setting"),
    [
        (set_version, "user_version"),
        (Path.unlink, "file"),
        (lambda path: path.chmod(0o666), "mode"),
    ],
)
async def test_an_audit_sees_what_somebody_did_to_the_live_file(
    tmp_path: Path, damage: Callable[[Path], None], setting: str
) -> None:
    path = tmp_path / "broker.db"
    backend = EmbeddedBackend(f"embedded:///{path}")
    await declare(backend)
    async with backend.storage() as storage:
        assert by_setting(list(await storage.audit([topic()]))) == {}
        damage(path)
        assert setting in by_setting(list(await storage.audit([topic()])))


async def test_an_audit_sees_that_our_connection_does_not_sync(file_url: str) -> None:
    backend = EmbeddedBackend(file_url)
    await declare(backend)
    async with backend.storage():
        await backend._database.read(lambda connection: connection.execute("PRAGMA synchronous = OFF").fetchall())
        assert by_setting(await audited(backend, topic())) == {"synchronous": Severity.LOSES}


async def test_an_audit_tells_when_the_broker_is_nearly_full(file_url: str) -> None:
    backend = EmbeddedBackend(file_url, {"max_bytes": 1_000_000})
    await declare(backend)
    async with backend.publisher() as publisher:
        outcome: object = None
        while not isinstance(outcome, Rejection):
            (outcome,) = await publisher.send([message("x" * 50_000)], deadline=soon())
        assert by_setting(await audited(backend, topic())) == {"bytes in use": Severity.RISKS}


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ("/dev/vda / ext4 rw 0 0\n", None),
        ("/dev/vda / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\n", "nfs4"),
        ("/dev/vda / ext4 rw 0 0\ntmpfs /data tmpfs rw 0 0\n", "tmpfs"),
        ("/dev/vda / ext4 rw 0 0\ntmpfs /dat tmpfs rw 0 0\n", None),
        ("tmpfs /data tmpfs rw 0 0\n/dev/vdb /data/disk ext4 rw 0 0\n", None),
    ],
)
async def test_a_file_system_that_forgets_or_is_far_away_is_told(
    tmp_path: Path, mounts: str, found: str | None
) -> None:
    table = tmp_path / "mounts"
    table.write_text(mounts)
    findings = list(file_system_finding("/data/disk/broker.db", table))
    assert [(finding.found, finding.severity) for finding in findings] == ([(found, Severity.LOSES)] if found else [])


async def test_a_table_of_mounts_that_cannot_be_read_is_unseen_and_no_pass(tmp_path: Path) -> None:
    findings = list(file_system_finding("/data/broker.db", tmp_path / "missing"))
    assert [finding.severity for finding in findings] == [Severity.UNSEEN]


async def test_a_broker_that_went_away_is_told_by_name(tmp_path: Path) -> None:
    backend = EmbeddedBackend(f"embedded:///{tmp_path}/broker.db")
    await declare(backend)
    async with backend.storage() as storage:
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)
        with pytest.raises(BrokerUnavailable, match=r"broker\.db"):
            await storage.declare([topic()])
