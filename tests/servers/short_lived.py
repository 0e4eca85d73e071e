"""Servers that live as long as the tests that started them: databases, each in a folder of its own.

One runs as somebody else where the tests run as root, and dies with the tests, also when they are killed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["ShortLived", "as_user", "serve", "user_for"]

START_SECONDS = 60.0
PR_SET_PDEATHSIG = 1
UNPRIVILEGED = "nobody"


def user_for(folder: Path) -> int | None:
    """Who runs a server: ourselves, or somebody without privileges, to whom the folder is given."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(UNPRIVILEGED)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return entry.pw_uid


def as_user(user: int | None) -> dict[str, Any]:
    """The options of a subprocess that runs as that user."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwuid(user).pw_gid, "extra_groups": []}


class ShortLived:
    """A server's process.

    answers: whether somebody can connect.  stop: the signal that it stops at.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        folder: Path,
        user: int | None,
        answers: Callable[[], bool],
        stop: int,
    ) -> None:
        self._name, self._command, self._folder = name, [str(part) for part in command], folder
        self._user, self._answers, self._stop = user, answers, stop
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return when it answers.  Raises RuntimeError with its words when it does not.

        Not from a thread that ends before the tests do: the server ends with who started it (PR_SET_PDEATHSIG).
        Tried again while it ends: what a killed one left behind may be in use for a moment.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process is None or self._process.poll() is not None:
                self._process = self._spawn()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._name} did not start:\n{(self._folder / 'log').read_text()}")
            time.sleep(0.05)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with open(self._folder / "log", "ab") as log:
            return subprocess.Popen(
                self._command,
                **as_user(self._user),
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the tests, which then stop it
                preexec_fn=lambda: _stop_with_parent(self._stop),  # before any thread of ours exists
            )

    def kill(self) -> None:
        """At once, with SIGKILL; :meth:`start` starts it again."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """As its own manual says."""
        self._end(self._stop)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=START_SECONDS)
            self._process = None


@contextmanager
def serve(
    name: str, command: Sequence[str | Path], folder: Path, user: int | None, answers: Callable[[], bool], stop: int
) -> Iterator[ShortLived]:
    """Run a server, until the block ends; see :class:`ShortLived`."""
    server = ShortLived(name, command, folder, user, answers, stop)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _stop_with_parent(stop: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, stop)
