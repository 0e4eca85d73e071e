"""A real MariaDB server for the tests, from the system's package.

It listens on a unix socket in a folder of its own.  Databases and their contents are left to the caller.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pymysql

from tests.servers.installing import program
from tests.servers.short_lived import ShortLived, as_user, serve, user_for


class MariadbServer:
    """A running server.  folder: where its socket is.  process: for whoever breaks it."""

    process: ShortLived

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "socket"
        self._numbers = itertools.count(1)

    def url(self, database: str) -> str:
        """The URL of one of its databases."""
        return f"mysql://root@localhost/{database}?unix_socket={self._socket}"

    @contextmanager
    def fresh_database(self) -> Iterator[str]:
        """The URL of an empty database, gone at the end."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name}")

    def answers(self) -> bool:
        """Whether somebody can connect."""
        with closing(socket.socket(socket.AF_UNIX)) as probe:  # PyMySQL leaves its own open where nobody listens
            if probe.connect_ex(str(self._socket)):
                return False
        self.execute("SELECT 1")
        return True

    def execute(self, statement: str) -> None:
        """As root."""
        with closing(pymysql.connect(unix_socket=str(self._socket), user="root")) as connection:
            connection.cursor().execute(statement)


@contextmanager
def run_mariadb() -> Iterator[MariadbServer]:
    """Start a server, stop it at the end, leave no file."""
    folder = Path(tempfile.mkdtemp(prefix="reliamq-my-"))  # short: a socket's path has at most 107 characters
    try:
        server_program = program("mariadbd", "mariadb-server")
        user, data = user_for(folder), folder / "data"
        initialise = [program("mariadb-install-db", "mariadb-server"), "--no-defaults", f"--datadir={data}"]
        subprocess.run(
            [*initialise, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            **as_user(user),
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        server = MariadbServer(folder)
        command = [
            *(server_program, "--no-defaults", f"--datadir={data}", f"--socket={folder / 'socket'}"),
            *(f"--pid-file={folder / 'pid'}", "--skip-networking", "--character-set-server=utf8mb4"),
            # Processes are killed in the tests, never the machine: the server need not wait for the disk.
            *("--innodb-flush-log-at-trx-commit=2", "--max-connections=200"),
        ]
        with serve("MariaDB", command, folder, user, server.answers, signal.SIGTERM) as process:
            server.process = process
            yield server
    finally:
        shutil.rmtree(folder)
