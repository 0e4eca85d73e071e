"""The tables that the stores need, where somebody else has made them: what is missing is named at the start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from reliamq import ConfigurationError, idempotency, outbox
from reliamq.database import open_sync_engine


@pytest.fixture
def made(database: str) -> Iterator[Engine]:
    """A database whose tables are whole."""
    with open_sync_engine(database) as engine:
        outbox.create_tables(engine, keep=True)
        idempotency.create_tables(engine)
        yield engine


def test_whole_tables_are_accepted_again(made: Engine) -> None:
    outbox.create_tables(made, keep=True)
    idempotency.create_tables(made)


@pytest.mark.parametrize(
    ("table", "change", "missing"),
    [
        ("reliamq_outbox", "DROP COLUMN error", "column reliamq_outbox.error"),
        ("reliamq_outbox_sent", "DROP COLUMN source", "column reliamq_outbox_sent.source"),
    ],
)
def test_a_missing_column_is_named(made: Engine, table: str, change: str, missing: str) -> None:
    with made.begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} {change}")
    with pytest.raises(ConfigurationError, match=missing):
        outbox.create_tables(made, keep=True)


def drop_index(engine: Engine, table: str, name: str) -> None:
    on_table = f" ON {table}" if engine.dialect.name == "mysql" else ""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP INDEX {name}{on_table}")


def test_a_missing_index_is_named(made: Engine) -> None:
    """O6 I5: without it relays and cleaning get slower with what is there."""
    drop_index(made, "reliamq_outbox", "reliamq_outbox_waiting")
    with pytest.raises(ConfigurationError, match=r"index of reliamq_outbox on \(bucket, position\)"):
        outbox.create_tables(made)
    drop_index(made, "reliamq_processed", "reliamq_processed_expiry")
    with pytest.raises(ConfigurationError, match=r"index of reliamq_processed on \(expires_at\)"):
        idempotency.create_tables(made)
