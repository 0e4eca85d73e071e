"""SQLite's failures in the words of the SPI, at one place.

It promises to say whether a failed write is certainly not stored or in doubt, and to name the file, the cause and the
remedy.  Deciding what to do about it is left to the callers.
"""

from __future__ import annotations

import errno
import sqlite3

from reliamq.spi import BrokerUnavailable, ConfigurationError, InDoubt, Outcome, Rejection, RejectionReason

__all__ = ["StoreFailure", "failure_of", "is_bad_value", "opening_error"]

_FULL = "the disk or the broker's own limit is full; nothing was stored. Make room, or raise max_bytes."
_REMEDIES: dict[int, str] = {
    sqlite3.SQLITE_BUSY: "another program holds the file's write lock; close it, or wait.",
    sqlite3.SQLITE_LOCKED: "another program holds the file's write lock; close it, or wait.",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened or created; check that its folder exists and is writable.",
    sqlite3.SQLITE_READONLY: "the file or its folder is read-only; the broker writes both.",
    sqlite3.SQLITE_PERM: "this user may not write the file; check its owner and mode.",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database; name another one. It was not touched.",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; keep a copy and restore it (sqlite3 FILE .recover).",
    sqlite3.SQLITE_IOERR: "reading or writing failed; look at the disk and the system log.",
}
_CONFIGURATION = frozenset({sqlite3.SQLITE_NOTADB})


class StoreFailure(Exception):
    """A job did not end well.

    reason: why nothing was stored, certainly; None: it may be stored.
    detail: one sentence for people.
    """

    def __init__(self, reason: RejectionReason | None, detail: str, cause: BaseException | None = None) -> None:
        self.reason, self.detail, self.cause = reason, detail, cause
        super().__init__(detail)

    def outcome(self, message_id: str) -> Outcome:
        """The same as the outcome of one message (P2)."""
        if self.reason is None:
            return InDoubt(message_id, self.detail, self.cause)
        return Rejection(message_id, self.reason, self.detail, self.cause)

    def unavailable(self, url: str) -> BrokerUnavailable:
        """The same as the exception of everything but publishing."""
        error = BrokerUnavailable(url, self.detail)
        error.__cause__ = self.cause
        return error


def is_bad_value(error: Exception) -> bool:
    """Whether a value was refused that no column can hold, before anything was stored."""
    if isinstance(error, sqlite3.InterfaceError | sqlite3.ProgrammingError):
        return "binding parameter" in str(error)
    return isinstance(error, OverflowError | ValueError | sqlite3.DataError)  # UnicodeEncodeError is a ValueError


def _primary_code(error: BaseException) -> int:
    code = getattr(error, "sqlite_errorcode", None)
    return sqlite3.SQLITE_ERROR if code is None else code & 0xFF


def _is_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.Error):
        return _primary_code(error) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _text(error: BaseException, path: str) -> str:
    remedy = _REMEDIES.get(_primary_code(error), "see the cause.")
    return f"{path}: {error}; {remedy}"


def failure_of(error: sqlite3.Error | OSError, path: str, *, committing: bool) -> StoreFailure:
    """What a failure means for the messages at hand.

    committing: it came out of COMMIT.  Before that everything is rolled back, so certainly not stored; an I/O error
    inside it leaves open whether the last page reached the disk.
    """
    if _is_full(error):
        return StoreFailure(RejectionReason.STORAGE_FULL, f"{path}: {_FULL}", error)
    if committing and _primary_code(error) != sqlite3.SQLITE_BUSY:
        return StoreFailure(None, f"{_text(error, path)} The commit may or may not be on the disk.", error)
    return StoreFailure(RejectionReason.UNAVAILABLE, _text(error, path), error)


def opening_error(error: sqlite3.Error | OSError, url: str, path: str) -> ConfigurationError | BrokerUnavailable:
    """Why the file cannot be used: wrong for good (ConfigurationError), or worth another try (BrokerUnavailable)."""
    if _primary_code(error) in _CONFIGURATION:
        return ConfigurationError(f"{url}: {_text(error, path)}")
    return BrokerUnavailable(url, _text(error, path))
