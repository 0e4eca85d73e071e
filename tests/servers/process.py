"""A server as an operating-system process: started, killed, stopped, paused, continued.

It is nobody's child, so that one run of the tests finds the servers that another left running; a file with its process
id says which it is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

__all__ = ["ServerDidNotStart", "ServerProcess", "wait_until"]

STOP_SECONDS = 30.0
LOOKS = 10  # in a row at which a server is not there, until it is taken for dead


class ServerDidNotStart(RuntimeError):
    """A server ended, or did not answer in time; the text has the end of its log."""


class ServerProcess:
    """One server.

    folder: where its data, its ``log`` and its ``pid`` file are.
    command, environment: how it is started, in that folder.
    """

    def __init__(
        self, name: str, folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.folder = name, folder
        self.command, self.environment = list(command), {**os.environ, **(environment or {})}
        self._pid_file = folder / "pid"

    @property
    def running(self) -> bool:
        """Whether it runs, paused or not."""
        return self._process() is not None

    def start(self) -> None:
        """Start it if it does not run.  Does not wait until it answers."""
        if self.running:
            return
        with open(self.folder / "log", "ab") as log:
            subprocess.run(
                ["/usr/bin/setsid", "--fork", "/bin/sh", "-c", 'echo $$ > pid; exec "$@"', "sh", *self.command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )
        deadline = time.monotonic() + STOP_SECONDS
        while not self.running and time.monotonic() < deadline:
            time.sleep(0.01)  # the shell has not written its number yet

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait until it is gone; SIGKILL if it takes too long."""
        self.resume()
        try:
            self._end(signal.SIGTERM)
        except psutil.TimeoutExpired:
            self.kill()

    def pause(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._send(signal.SIGCONT)

    @property
    def state(self) -> str:
        """What its file and the system say of its process."""
        try:
            number = self._pid_file.read_text().strip()
            process = psutil.Process(int(number))
            return f"process {number} is {process.status()} in {process.cwd()} since {process.create_time():.0f}"
        except (OSError, ValueError, psutil.Error) as error:
            return f"{error!r}"

    def last_words(self, characters: int = 4000) -> str:
        """The end of its log."""
        log = self.folder / "log"
        return log.read_text(errors="replace")[-characters:] if log.exists() else "(no log)"

    def _end(self, number: signal.Signals) -> None:
        process = self._process()
        if process is None:
            return
        process.send_signal(number)
        process.wait(timeout=STOP_SECONDS)
        self._pid_file.unlink(missing_ok=True)

    def _send(self, number: signal.Signals) -> None:
        process = self._process()
        if process is not None:
            process.send_signal(number)

    def _process(self) -> psutil.Process | None:
        """The process, or None; a process that merely got the same number is not it."""
        try:
            process = psutil.Process(int(self._pid_file.read_text()))
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return process if Path(process.cwd()) == self.folder.resolve() else None
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None


def wait_until(ready: Callable[[], bool], seconds: float, servers: Sequence[ServerProcess]) -> None:
    """Call ``ready`` until it is true.  Raises ServerDidNotStart when a server ended or time is over."""
    deadline = time.monotonic() + seconds
    looks = dict.fromkeys(servers, 0)
    while not ready():
        # Once is not enough: on a busy machine a server that had just been started was not seen for a moment
        looks = {server: 0 if server.running else looks[server] + 1 for server in servers}
        dead = [server for server in servers if looks[server] >= LOOKS]
        if dead or time.monotonic() > deadline:
            blamed = dead or servers
            words = "\n".join(f"--- {server.name}, {server.state}\n{server.last_words()}" for server in blamed)
            raise ServerDidNotStart(f"after {seconds:.0f} s or less: {[one.name for one in blamed]}\n{words}")
        time.sleep(0.2)
