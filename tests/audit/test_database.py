"""The audit of the user's own database: what would lose orders and messages is found on the live server (S2)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text

from reliamq import idempotency, outbox
from reliamq.audit import audit_database
from reliamq.database import open_engine
from reliamq.spi import BrokerUnavailable, Finding, Severity
from tests.servers.mariadb import MariadbServer

pytestmark = pytest.mark.anyio
on_mariadb = pytest.mark.xdist_group("mariadb")


async def audited(url: str) -> Sequence[Finding]:
    async with open_engine(url) as engine:
        return await audit_database(engine)


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@contextmanager
def server_set_to(url: str, setting: str, value: str) -> Iterator[None]:
    """Change the whole server, and back."""
    execute(url, f"ALTER SYSTEM SET {setting} = '{value}'", "SELECT pg_reload_conf()", "SELECT pg_sleep(0.3)")
    try:
        yield
    finally:
        execute(url, f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()", "SELECT pg_sleep(0.3)")


async def test_a_sound_server_and_a_sound_file_give_no_finding(postgresql_url: str, tmp_path: Path) -> None:
    with server_set_to(postgresql_url, "fsync", "on"):
        assert await audited(postgresql_url) == []
    (tmp_path / "app.db").touch()
    assert await audited(f"sqlite:///{tmp_path}/app.db") == []


async def test_a_file_that_is_not_there_is_found_and_not_made(tmp_path: Path) -> None:
    (finding,) = await audited(f"sqlite:///{tmp_path}/app.db")

    assert (finding.severity, finding.setting) == (Severity.LOSES, "file")
    assert "app.db is missing" in finding.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "setting", "found"),
    [
        ("ALTER DATABASE {database} SET synchronous_commit = off", "synchronous_commit", "off"),
        ("CREATE UNLOGGED TABLE reliamq_outbox (position bigint)", "unlogged tables", "reliamq_outbox"),
    ],
)
async def test_what_loses_messages_is_found_with_its_value_and_what_to_do(
    postgresql_url: str, change: str, setting: str, found: str
) -> None:
    execute(postgresql_url, change.format(database=make_url(postgresql_url).database))

    with server_set_to(postgresql_url, "fsync", "on"):
        (finding,) = await audited(postgresql_url)

    assert (finding.severity, finding.setting, finding.found) == (Severity.LOSES, setting, found)
    assert "ALTER" in finding.fix


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_what_the_server_was_told_is_read_live(postgresql_url: str, setting: str) -> None:
    with server_set_to(postgresql_url, setting, "off"):
        findings = await audited(postgresql_url)

    assert setting in [one.setting for one in findings if one.severity is Severity.LOSES]


async def test_standbys_that_nobody_waits_for_are_a_risk(postgresql_url: str) -> None:
    execute(postgresql_url, f"ALTER DATABASE {make_url(postgresql_url).database} SET synchronous_commit = local")
    with server_set_to(postgresql_url, "synchronous_standby_names", "elsewhere"):
        findings = await audited(postgresql_url)

    (standbys,) = [one for one in findings if one.setting == "synchronous standbys"]
    assert standbys.severity is Severity.RISKS


async def test_other_roles_that_do_not_wait_for_the_disk_are_a_risk(postgresql_url: str) -> None:
    database = make_url(postgresql_url).database
    execute(
        postgresql_url,
        "CREATE ROLE hasty LOGIN",
        "CREATE ROLE elsewhere LOGIN",
        f"ALTER ROLE hasty IN DATABASE {database} SET synchronous_commit = off",
        "ALTER ROLE elsewhere IN DATABASE postgres SET synchronous_commit = off",
    )
    try:
        findings = await audited(postgresql_url)
    finally:
        execute(postgresql_url, "DROP ROLE hasty", "DROP ROLE elsewhere")

    (others,) = [one for one in findings if one.setting == "synchronous_commit of other roles"]
    assert (others.severity, others.found) == (Severity.RISKS, "hasty")


async def test_the_tables_that_reliamq_makes_are_logged(postgresql_url: str) -> None:
    async with open_engine(postgresql_url) as engine:
        await outbox.create_tables_async(engine)
        async with engine.connect() as connection:
            kinds = await connection.scalars(
                text("SELECT relpersistence FROM pg_class WHERE starts_with(relname, 'reliamq_')")
            )
            assert set(kinds) == {"p"}


async def test_a_server_that_is_away_is_named_without_its_password() -> None:
    with pytest.raises(BrokerUnavailable) as caught:
        await audited("postgresql://ada:hunter2@127.0.0.1:1/app?sslpassword=hunter2")
    assert "127.0.0.1:1/app" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_a_value_that_cannot_be_read_is_a_finding_and_the_others_are_read(postgresql_url: str) -> None:
    database = make_url(postgresql_url).database
    execute(
        postgresql_url,
        "DROP ROLE IF EXISTS looker",
        "CREATE ROLE looker LOGIN",
        "REVOKE EXECUTE ON FUNCTION pg_is_in_recovery() FROM PUBLIC",
        f"ALTER DATABASE {database} SET synchronous_commit = off",
    )

    findings = await audited(postgresql_url.replace("postgres@", "looker@"))

    severities = {one.setting: one.severity for one in findings}
    assert severities["in recovery"] is Severity.UNSEEN
    assert severities["synchronous_commit"] is Severity.LOSES


# --- MariaDB ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def tables(mariadb_url: str, mariadb_server: MariadbServer) -> AsyncIterator[str]:
    """The URL of a sound database with the outbox's tables."""
    mariadb_server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    async with open_engine(mariadb_url) as engine:
        await outbox.create_tables_async(engine, keep=True)
        await idempotency.create_tables_async(engine)
    yield mariadb_url
    mariadb_server.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 0, GLOBAL read_only = 0")


@on_mariadb
async def test_a_sound_mariadb_gives_no_finding(tables: str) -> None:
    assert await audited(tables) == []


@on_mariadb
@pytest.mark.parametrize(
    ("statement", "setting", "found"),
    [
        ("SET GLOBAL innodb_flush_log_at_trx_commit = 2", "innodb_flush_log_at_trx_commit", "2"),
        ("SET GLOBAL read_only = 1", "read_only", "1"),
        ("ALTER TABLE {database}.reliamq_outbox ENGINE = MyISAM", "tables without transactions", "reliamq_outbox"),
        (
            "ALTER TABLE {database}.reliamq_processed CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
            "tables that compare loosely",
            "reliamq_processed",
        ),
    ],
)
async def test_what_would_lose_messages_on_mariadb_is_found(
    mariadb_server: MariadbServer, tables: str, statement: str, setting: str, found: str
) -> None:
    mariadb_server.execute(statement.format(database=make_url(tables).database))
    (finding,) = await audited(tables)

    assert (finding.severity, finding.setting, finding.found) == (Severity.LOSES, setting, found)
    assert finding.fix
