"""LISTEN and NOTIFY on PostgreSQL: relays elsewhere are told when messages have committed.

Only a help: a relay polls all the same, so whoever is not told is found.  A trigger tells, for each statement that adds
messages.  Its price: PostgreSQL lets transactions that notify commit one after another, in the whole server (its
source, ``async.c``, ``PreCommit_Notify``).  Measured in ``docs/departure.md``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from reliamq.outbox.table import OutboxMessage
from reliamq.outbox.waking import wake_relays
from reliamq.spi import ConfigurationError, MissingExtra

__all__ = ["create_notify_trigger", "create_notify_trigger_async", "drop_notify_trigger", "listening"]

logger = logging.getLogger("reliamq.outbox")
CHANNEL = OutboxMessage.__tablename__
AGAIN_SECONDS = 1.0
PROBE_SECONDS = 30.0
"""After so much silence the connection is asked whether it lives; a half-open one would be silent for ever."""

NAME = f"{CHANNEL}_notify"
DROP = (f"DROP TRIGGER IF EXISTS {NAME} ON {CHANNEL}", f"DROP FUNCTION IF EXISTS {NAME}()")
CREATE = (
    *DROP,
    f"""CREATE FUNCTION {NAME}() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_notify('{CHANNEL}', ''); RETURN NULL; END $$""",
    f"CREATE TRIGGER {NAME} AFTER INSERT ON {CHANNEL} FOR EACH STATEMENT EXECUTE FUNCTION {NAME}()",
)


def create_notify_trigger(engine: Engine) -> None:
    """Have PostgreSQL tell relays with ``relay.listen`` of each transaction that adds messages, when it commits.

    Raises ConfigurationError on another database.
    """
    with engine.begin() as connection:
        _run(connection, CREATE)


async def create_notify_trigger_async(engine: AsyncEngine) -> None:
    """The same on an async engine."""
    async with engine.begin() as connection:
        await connection.run_sync(_run, CREATE)


def drop_notify_trigger(engine: Engine) -> None:
    """Undo it; relays poll again."""
    with engine.begin() as connection:
        _run(connection, DROP)


def _run(connection: Connection, statements: Sequence[str]) -> None:
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(f"NOTIFY is PostgreSQL's; on {connection.dialect.name} relays poll")
    for statement in statements:
        connection.exec_driver_sql(statement)


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[None]:
    """Wake the relays of this process whenever the database of ``url`` tells of messages, while the block runs.

    Raises ConfigurationError when it is no PostgreSQL, MissingExtra without psycopg.
    """
    place = make_url(url)
    if place.get_backend_name() != "postgresql":
        raise ConfigurationError(f"relay.listen needs PostgreSQL, and the database is {place.get_backend_name()}")
    try:
        import psycopg
    except ImportError as error:
        raise MissingExtra("postgresql", "psycopg", "pip install 'reliamq[postgres]'") from error
    plain = place.set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        psycopg.conninfo.make_conninfo(plain)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(f"relay.listen connects by psycopg, which does not take this URL: {error}") from error
    listener = asyncio.create_task(_listen_for_ever(psycopg, plain))
    try:
        yield
    finally:
        listener.cancel()
        with suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):
            await listener


async def _listen_for_ever(psycopg: Any, url: str) -> None:
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                wake_relays()  # what came while nobody listened
                while True:
                    async for _ in connection.notifies(timeout=PROBE_SECONDS):
                        wake_relays()
                    await connection.execute("SELECT 1")
        except (psycopg.Error, OSError) as error:
            said = (str(error) or repr(error)).splitlines()[0]
            logger.warning("not told of new messages, polling meanwhile: %s", said)
            await asyncio.sleep(AGAIN_SECONDS)
