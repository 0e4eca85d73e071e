"""The queue in which the processes of a machine wait for their turn to write.

SQLite lets one connection write at a time, and those that wait sleep and look again, so that a busy one starves them.
Here they sleep in the kernel and are woken when the lock is free.  It promises order among reliamq's processes alone:
a foreign program is kept off by SQLite's own lock.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from reliamq.embedded.errors import StoreFailure
from reliamq.spi import RejectionReason

try:
    import fcntl
except ImportError:  # Windows: SQLite's own lock and its busy timeout are all there is
    fcntl = None  # type: ignore[assignment]

__all__ = ["WriteLock"]


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StoreFailure(
            RejectionReason.UNAVAILABLE,
            f"{path}: {error.strerror}; the broker's folder must exist and be writable.",
            error,
        ) from error


def _close_all() -> None:
    for lock in list(_locks):
        lock.close()


_locks: weakref.WeakSet[WriteLock] = weakref.WeakSet()
if fcntl is not None:
    # A forked child shares the parent's lock, and would keep it after the parent's death.
    os.register_at_fork(after_in_child=_close_all)


class WriteLock:
    """An advisory lock on ``<path>-lock``, free again when its process dies.  Used by one thread."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None or fcntl is None else f"{path}-lock"
        self._file = -1
        self._doubtful = False
        _locks.add(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait, in the kernel, without an end.  Raises StoreFailure when the lock file cannot be made."""
        if self._path is None:
            yield
            return
        if self._doubtful:
            self.close()
        if self._file < 0:
            self._file = _open(self._path)
        file = self._file
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def doubt(self) -> None:
        """Open it anew next time: the one that is open may have been deleted."""
        self._doubtful = True

    def close(self) -> None:
        """Give the file back.  The file itself stays: another process may be about to lock it."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._doubtful = -1, False
