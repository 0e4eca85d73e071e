"""The durability of the user's own database: outbox and processed ids are only as safe as its commits.

SQLite: journal mode and synchronous as our connections have them.  PostgreSQL: fsync, synchronous_commit,
full_page_writes, unlogged tables, recovery.  MySQL and MariaDB: when InnoDB and the binary log reach the disk, half
written pages, engine and collation of reliamq's tables.  What cannot be read is a finding and never a pass.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reliamq.settings import masked
from reliamq.spi import BrokerUnavailable, Finding, Severity

__all__ = ["audit_database"]


@dataclass(frozen=True, slots=True)
class _Rule:
    """query: reads one value.  safe: what it may be.  why, fix: as in a finding."""

    setting: str
    query: str
    safe: tuple[str, ...]
    severity: Severity
    why: str
    fix: str


SQLITE = (
    _Rule(
        "synchronous",
        "PRAGMA synchronous",
        ("2", "3"),
        Severity.LOSES,
        "A committed order may not be on the disk when the power fails.",
        "Open the file with PRAGMA synchronous = FULL.",
    ),
    _Rule(
        "journal_mode",
        "PRAGMA journal_mode",
        ("wal", "delete", "truncate", "persist"),
        Severity.LOSES,
        "Without a journal on the disk a crash in a transaction damages the file.",
        "PRAGMA journal_mode = WAL.",
    ),
)

POSTGRESQL = (
    _Rule(
        "fsync",
        "SHOW fsync",
        ("on",),
        Severity.LOSES,
        "Commits are not forced to the disk: a crash of the machine loses or damages them.",
        "Set fsync = on.",
    ),
    _Rule(
        "synchronous_commit",
        "SHOW synchronous_commit",
        ("on", "remote_write", "remote_apply", "local"),
        Severity.LOSES,
        "COMMIT answers before the order is on the disk; a crash loses it, with its message.",
        "Set synchronous_commit = on, also for this role and database (ALTER ROLE … SET, ALTER DATABASE … SET).",
    ),
    _Rule(
        "synchronous_commit of other roles",
        """SELECT coalesce(string_agg(DISTINCT rolname::text, ', '), 'none') FROM pg_db_role_setting
        JOIN pg_roles ON pg_roles.oid = setrole LEFT JOIN pg_database ON pg_database.oid = setdatabase
        WHERE 'synchronous_commit=off' = ANY (setconfig) AND coalesce(datname, current_database()) = current_database()
        AND rolname <> current_user""",
        ("none",),
        Severity.RISKS,
        "What these roles commit may not be on the disk when COMMIT answers; a crash loses it, with its messages.",
        "ALTER ROLE … RESET synchronous_commit (and … IN DATABASE …), where the role adds messages or handles them.",
    ),
    _Rule(
        "synchronous standbys",
        """SELECT CASE WHEN current_setting('synchronous_standby_names') = '' THEN 'none'
        WHEN current_setting('synchronous_commit') = 'local' THEN 'not waited for' ELSE 'waited for' END""",
        ("none", "waited for"),
        Severity.RISKS,
        "synchronous_commit = local does not wait for the standbys that there are: a failover loses the order.",
        "Set synchronous_commit = on, also for this role and database (ALTER ROLE … SET, ALTER DATABASE … SET).",
    ),
    _Rule(
        "unlogged tables",
        """SELECT coalesce(string_agg(relname, ', '), 'none') FROM pg_class
        WHERE relpersistence = 'u' AND relkind = 'r' AND starts_with(relname, 'reliamq_')""",
        ("none",),
        Severity.LOSES,
        "PostgreSQL empties an unlogged table after a crash: messages in the outbox and processed ids are gone.",
        "ALTER TABLE … SET LOGGED.",
    ),
    _Rule(
        "full_page_writes",
        "SHOW full_page_writes",
        ("on",),
        Severity.LOSES,
        "A page half written in a crash cannot be repaired.",
        "Set full_page_writes = on, unless the file system writes pages atomically.",
    ),
    _Rule(
        "in recovery",
        "SELECT pg_is_in_recovery()::text",
        ("false",),
        Severity.LOSES,
        "It is a standby: nothing can be written, so no order and no message.",
        "Point the database URL at the primary.",
    ),
)

_OUR_TABLES = "table_schema = database() AND table_name LIKE 'reliamq~_%' ESCAPE '~'"
MYSQL = (
    _Rule(
        "innodb_flush_log_at_trx_commit",
        "SELECT @@innodb_flush_log_at_trx_commit",
        ("1", "3"),  # 3 is MariaDB's: as 1, with one more flush
        Severity.LOSES,
        "COMMIT answers before the order is on the disk; a crash loses up to a second of orders, with their messages.",
        "SET GLOBAL innodb_flush_log_at_trx_commit = 1, and in the server's configuration file.",
    ),
    _Rule(
        "sync_binlog",
        "SELECT CASE WHEN @@log_bin = 0 THEN 'no binary log' ELSE @@sync_binlog END",
        ("no binary log", "1"),
        Severity.LOSES,
        "After a crash the server rolls back what its binary log does not have, also what was committed.",
        "SET GLOBAL sync_binlog = 1, and in the server's configuration file.",
    ),
    _Rule(
        "innodb_doublewrite",
        "SELECT @@innodb_doublewrite",
        ("1", "ON", "DETECT_AND_RECOVER", "fast"),  # fast: MariaDB 11, as safe as ON
        Severity.LOSES,
        "A page half written in a crash cannot be repaired.",
        "Set innodb_doublewrite = ON, unless the file system writes pages atomically.",
    ),
    _Rule(
        "read_only",
        "SELECT @@read_only",
        ("0",),
        Severity.LOSES,
        "It is a replica, or closed: nothing can be written, so no order and no message.",
        "Point the database URL at the primary.",
    ),
    _Rule(
        "tables without transactions",
        f"""SELECT coalesce(group_concat(table_name), 'none') FROM information_schema.tables
        WHERE {_OUR_TABLES} AND engine <> 'InnoDB'""",  # noqa: S608  # constants
        ("none",),
        Severity.LOSES,
        "What is written there stays when the order is rolled back, and goes in a crash.",
        "ALTER TABLE … ENGINE = InnoDB.",
    ),
    _Rule(
        "tables that compare loosely",
        f"""SELECT coalesce(group_concat(DISTINCT table_name), 'none') FROM information_schema.columns
        WHERE {_OUR_TABLES} AND collation_name NOT LIKE '%~_bin' ESCAPE '~'""",  # noqa: S608  # constants
        ("none",),
        Severity.LOSES,
        "Ids that differ in upper and lower case alone are taken for the same: a message is dropped as processed.",
        "ALTER TABLE … CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin.",
    ),
)

RULES = {"sqlite": SQLITE, "postgresql": POSTGRESQL, "mysql": MYSQL, "mariadb": MYSQL}


async def audit_database(engine: AsyncEngine) -> Sequence[Finding]:
    """Read the live values and create nothing.  Raises BrokerUnavailable when the database cannot be reached."""
    subject = f"database {masked(engine.url.render_as_string())}"
    rules = RULES.get(engine.dialect.name)
    if rules is None:
        return [_unseen(subject, "durability", f"reliamq does not know how to audit {engine.dialect.name}")]
    if (missing := _missing_file(engine)) is not None:
        return [_no_file(subject, missing)]
    try:
        async with engine.connect() as connection:
            return [finding async for finding in _check(connection, subject, rules)]
    except (SQLAlchemyError, OSError) as error:
        raise BrokerUnavailable(subject, str(error).splitlines()[0]) from error


def _missing_file(engine: AsyncEngine) -> Path | None:
    """The SQLite file that connecting would make."""
    name = engine.url.database
    if engine.dialect.name != "sqlite" or not name or name == ":memory:" or name.startswith("file:"):
        return None
    path = Path(name).absolute()
    return None if path.exists() else path


def _no_file(subject: str, path: Path) -> Finding:
    why = "The database is not there: no order and no message can be in it."
    fix = "Correct the URL, or, where it is to be a new one: start the application once, which makes it."
    return Finding(Severity.LOSES, subject, "file", f"{path} is missing", "there", why, fix)


async def _check(connection: AsyncConnection, subject: str, rules: Sequence[_Rule]) -> AsyncIterator[Finding]:
    for rule in rules:
        try:
            found = str(await connection.scalar(text(rule.query)))
        except SQLAlchemyError as error:
            yield _unseen(subject, rule.setting, str(error).splitlines()[0])
            await connection.rollback()  # PostgreSQL refuses further statements of a failed transaction
            continue
        if found not in rule.safe:
            required = " or ".join(rule.safe)
            yield Finding(rule.severity, subject, rule.setting, found, required, rule.why, rule.fix)


def _unseen(subject: str, setting: str, reason: str) -> Finding:
    fix = "Give the user the right to read it, or check it by hand."
    return Finding(Severity.UNSEEN, subject, setting, "not readable", "readable", f"{reason}.", fix)
