"""One process's hold on a broker's file: its connection, its turn to write, its transactions.

It promises that a transaction is committed to the disk, or rolled back and certainly not stored, or said to be in doubt
(P2), and that nothing is written into a file that was deleted.  It is used by one thread; what is written is left to
the others.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress

from reliamq.embedded.errors import StoreFailure, failure_of
from reliamq.embedded.opening import connect
from reliamq.embedded.settings import Location
from reliamq.embedded.writelock import WriteLock
from reliamq.spi import RejectionReason

__all__ = ["BrokerFile"]

logger = logging.getLogger(__name__)


class BrokerFile:
    """Opened when it is first needed, and again after a failure that makes its connection doubtful."""

    def __init__(self, location: Location) -> None:
        self.name = location.path or location.url
        self._location = location
        self._lock = WriteLock(location.path)
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._seen_version = 0

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    def connection(self) -> sqlite3.Connection:
        """The connection.  Raises ConfigurationError, BrokerUnavailable or StoreFailure when it cannot be opened."""
        if self._connection is None:
            with self._lock.held():  # two that switch a new file to WAL at once would lock each other out
                self._connection = connect(self._location)
            self._identity = self._identity_now()
            self._seen_version = _data_version(self._connection)
        return self._connection

    def transaction(self, run: Callable[[sqlite3.Connection], None]) -> None:
        """Run a function in a transaction of its own; when this returns it is on the disk.

        Raises what :meth:`connection` raises; StoreFailure when the transaction could not begin or commit; and, with
        everything rolled back, what ``run`` raises.
        """
        connection = self.connection()
        with self._lock.held():
            self._begin(connection)
            try:
                run(connection)
            except BaseException:
                self._roll_back(connection)
                raise
            failure = self._commit(connection)
        if failure is not None:
            if failure.reason is None:  # after a failed fsync the kernel may call the next one good: start afresh
                self._disconnect()
            raise failure

    def _begin(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise failure_of(error, self.name, committing=False) from error
        if self._identity_now() != self._identity:
            connection.execute("ROLLBACK")
            self._disconnect()
            raise StoreFailure(
                RejectionReason.UNAVAILABLE,
                f"{self.name}: the file was deleted or replaced while it was in use, and would keep nothing; "
                "nothing was stored. Put it back, or declare the topics again in the new one.",
            )

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        if not connection.in_transaction:  # when the disk is full SQLite itself may have rolled back
            return
        try:
            connection.execute("ROLLBACK")
        except sqlite3.Error:  # what is in the way of it was told already; closing rolls back
            self._disconnect()

    def _commit(self, connection: sqlite3.Connection) -> StoreFailure | None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error):  # the first failure is the one to tell
                connection.execute("ROLLBACK")
            return failure_of(error, self.name, committing=True)
        return None

    def was_changed(self) -> bool:
        """Whether another connection has committed since this was last asked; cheap, and not a transaction."""
        if self._connection is None or self._location.path is None:
            return False
        try:
            version = _data_version(self._connection)
        except sqlite3.Error:
            return True  # whatever it is: who looks closer meets it
        changed, self._seen_version = version != self._seen_version, version
        return changed

    def judged(self, error: Exception) -> Exception:
        """A failure of the file in our words; anything else (a bad value, a fault of this program) as it is."""
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.DataError):
            return error
        if isinstance(error, sqlite3.DatabaseError | OSError):
            return failure_of(error, self.name, committing=False)
        return error

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        try:
            if self._connection is not None:
                with self._lock.held():  # the last to close empties the WAL: not while others open
                    self._connection.close()
        except (sqlite3.Error, OSError, StoreFailure) as error:  # what was committed is safe in the WAL
            logger.warning("%s: could not be closed properly: %s", self.name, error)
        self._connection = None
        self._lock.close()

    def _disconnect(self) -> None:
        """Drop a connection that can no longer be trusted; the lock's file may be gone as well."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # what is wrong with it was told already
                connection.close()
        self._lock.doubt()

    def _identity_now(self) -> tuple[int, int] | None:
        """Which file is there now: a deleted one takes every write and keeps none."""
        if self._location.path is None:
            return None
        try:
            status = os.stat(self._location.path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino


def _data_version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA data_version").fetchone()
    return int(version)
