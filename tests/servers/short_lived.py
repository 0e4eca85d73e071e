"""Servers that live as long as the tests that started them: databases, each in a folder of its own.

One runs as somebody else where the tests run as root, and dies with the tests, also when they are killed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["as_user", "serve", "user_for"]

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


@contextmanager
def serve(
    name: str, command: Sequence[str | Path], folder: Path, user: int | None, answers: Callable[[], bool], stop: int
) -> Iterator[None]:
    """Run a server, until the block ends.  answers: whether it does.  stop: the signal that it stops at.

    Raises RuntimeError with its words when it does not start.
    """
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            **as_user(user),
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for the tests, which then stop it
            preexec_fn=lambda: _stop_with_parent(stop),  # before any thread of ours exists
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start:\n{(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(stop)
        process.wait(timeout=START_SECONDS)


def _stop_with_parent(stop: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, stop)
