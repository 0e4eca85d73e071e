"""The guard for effects in the database: effect and processed id are one commit (I1, I2).

The processed id is inserted first, in the handler's own transaction: a second delivery meets the unique constraint, at
once or when the first commits.  What the handler adds to the outbox in its session joins the same commit.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
from sqlalchemy import Connection, Engine, Insert, Select, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from reliamq.database import MYSQL, now_seconds
from reliamq.idempotency.cleaning import remove_expired
from reliamq.idempotency.tables import processed
from reliamq.idempotency.versions import ATTEMPTS, is_conflict, pause_seconds, retry_on_conflict
from reliamq.spi import ConfigurationError, EffectBusy, ProcessedId, TransactionRequired

__all__ = ["TransactionGuard"]

IN_TRANSACTION = 2  # libpq's PQTRANS_INTRANS; 0 is none, 3 is failed


class TransactionGuard:
    """The EffectGuard of ``effects="transaction"``; an effect gets the session as its argument.

    engine, sync_engine: for ``async def`` and plain handlers; only what is used must be given.
    keep: how long processed ids are kept (I5).  threads: plain handlers that run at once.
    A version conflict, a serialization failure or a deadlock runs the whole effect again at once (I4).
    """

    def __init__(
        self,
        engine: AsyncEngine | None,
        sync_engine: Engine | None = None,
        *,
        keep: timedelta = timedelta(days=14),
        threads: int = 64,
    ) -> None:
        self._engine, self._sync_engine = engine, sync_engine
        self._keep = keep.total_seconds()
        self._threads = anyio.CapacityLimiter(threads)

    async def apply(self, identity: ProcessedId, effect: Callable[[Any], Awaitable[None]]) -> bool:
        """See :meth:`reliamq.spi.EffectGuard.apply`."""
        return await retry_on_conflict(lambda: self._once(identity, effect))

    async def _once(self, identity: ProcessedId, effect: Callable[[Any], Awaitable[None]]) -> bool:
        if self._engine is None:
            raise ConfigurationError("an async def handler needs an async engine")
        async with AsyncSession(self._engine, expire_on_commit=False) as session:
            # Leaving the block without commit rolls back, on a cancellation too.
            await session.run_sync(_connect)
            if not await self._marked(session, identity):
                return False
            fence = await session.run_sync(_CommitFence, _there(identity))
            await effect(session)
            await session.run_sync(fence.lift)
            await session.commit()
            return True

    async def _marked(self, session: AsyncSession, identity: ProcessedId) -> bool:
        try:
            await session.execute(self._mark(identity))
        except IntegrityError:  # of this one statement, so it is no constraint of the user's
            return False
        return True

    async def apply_in_thread(self, identity: ProcessedId, effect: Callable[[Any], None]) -> bool:
        """See :meth:`reliamq.spi.EffectGuard.apply_in_thread`.

        Cancelled: the thread runs on and may still commit; then the message is found processed when it comes again.
        """
        return await anyio.to_thread.run_sync(
            self._apply_plainly, identity, effect, abandon_on_cancel=True, limiter=self._threads
        )

    def _apply_plainly(self, identity: ProcessedId, effect: Callable[[Any], None]) -> bool:
        for attempt in range(1, ATTEMPTS):
            try:
                return self._once_plainly(identity, effect)
            except Exception as error:
                if not is_conflict(error):
                    raise
            time.sleep(pause_seconds(attempt))
        return self._once_plainly(identity, effect)

    def _once_plainly(self, identity: ProcessedId, effect: Callable[[Any], None]) -> bool:
        if self._sync_engine is None:
            raise ConfigurationError("a plain def handler needs a synchronous engine")
        with Session(self._sync_engine, expire_on_commit=False) as session:
            _connect(session)
            try:
                session.execute(self._mark(identity))
            except IntegrityError:
                return False
            fence = _CommitFence(session, _there(identity))
            effect(session)
            fence.lift(session)
            session.commit()
            return True

    def _mark(self, identity: ProcessedId) -> Insert:
        return insert(processed).values(
            topic=identity.topic,
            group_name=identity.group,
            handler=identity.handler,
            message_id=identity.message_id,
            expires_at=now_seconds() + self._keep,
        )

    async def clean(self, *, limit: int) -> int:
        """Remove up to ``limit`` expired processed ids, oldest first, by their index; how many (I5)."""
        if self._engine is None:
            return 0
        return await remove_expired(self._engine, processed, limit)


OUTAGE_PAUSE = timedelta(seconds=2)


def _connect(session: Session) -> None:
    """Begin.  A database that cannot be reached is an outage and no attempt: ten minutes of it would otherwise turn
    everything into dead letters.
    """
    try:
        session.connection()
    except (DBAPIError, PoolTimeout, OSError) as error:
        if is_conflict(error):
            raise
        raise EffectBusy(OUTAGE_PAUSE, f"the database cannot be reached ({type(error).__name__})") from error


ENDS_A_TRANSACTION = {"COMMIT", "END", "ROLLBACK", "ABORT", "BEGIN", "START"}
"""First words of statements that part effect and mark; ``ROLLBACK TO`` a savepoint does not."""


class _CommitFence:
    """Keeps a handler from committing or rolling back the session: mark and effect must not part.

    Savepoints are the handler's own business and pass.  mark: finds the mark.
    """

    def __init__(self, session: Session, mark: Select[tuple[str]]) -> None:
        self._session, self._transaction, self._mark = session, session.get_transaction(), mark
        self._lifted = False
        connection = session.connection()
        event.listen(session, "before_commit", self._check_session)
        event.listen(connection, "commit", self._check_connection)
        event.listen(connection, "before_cursor_execute", self._check_statement)

    def _check_session(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self._refuse()

    def _check_connection(self, connection: Connection) -> None:
        if not self._lifted:
            connection.invalidate()  # SQLAlchemy takes its transaction for ended now; the database rolls it back
        self._refuse()

    def _check_statement(self, _connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        words = statement.split(None, 2)
        if words and words[0].rstrip(";").upper() in ENDS_A_TRANSACTION and "TO" not in map(str.upper, words[1:]):
            self._refuse()

    def _refuse(self) -> None:
        if not self._lifted:
            raise TransactionRequired(
                "a handler must not end its session's transaction: reliamq commits it together with the processed id. "
                "Raise an exception to roll back; use session.begin_nested() for a part that may fail by itself"
            )

    def lift(self, session: Session) -> None:
        """The handler is done.  TransactionRequired when the transaction that holds the mark is gone."""
        self._lifted = True
        if session.get_transaction() is not self._transaction or not _is_open(session.connection(), self._mark):
            raise TransactionRequired(
                "the transaction is gone, and the processed id with it: the handler rolled it back, or caught an error "
                "after which the database gave it up. Raise an exception to roll back; use session.begin_nested() "
                "around a statement that may fail"
            )


def _there(identity: ProcessedId) -> Select[tuple[str]]:
    """Finds the mark."""
    return select(processed.c.message_id).where(
        processed.c.topic == identity.topic,
        processed.c.group_name == identity.group,
        processed.c.handler == identity.handler,
        processed.c.message_id == identity.message_id,
    )


def _is_open(connection: Connection, mark: Select[tuple[str]]) -> bool:
    """Whether a commit would commit.  PostgreSQL answers COMMIT after a failed statement with a silent rollback; SQLite
    ends a transaction by itself on some errors, MySQL on a deadlock, and there the next statement begins another one,
    which shows in the mark alone.
    """
    if connection.dialect.name in MYSQL:
        return connection.scalar(mark) is not None
    driver: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite":
        return bool(driver.in_transaction)
    if connection.dialect.name == "postgresql":
        status = getattr(getattr(driver, "info", None), "transaction_status", None)  # psycopg knows without asking
        if status is not None:
            return bool(status == IN_TRANSACTION)
        connection.execute(text("SELECT 1"))  # raises in a transaction that failed
    return True
