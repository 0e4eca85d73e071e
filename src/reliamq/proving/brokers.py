"""Brokers that die while the proof runs: one at a time, by a command of the user's, and always started again.

``COMMAND list`` prints the brokers' names, one a line.  ``COMMAND kill NAME`` kills one as a power cut would.
``COMMAND start NAME`` starts it, and returns when it answers and has caught up with the others: two that lack at once
are more than a cluster promises to survive.  What fails ends with an exit code that is not 0.
"""

from __future__ import annotations

import random
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence

from reliamq.spi import ConfigurationError

__all__ = ["BrokerCommand", "BrokerKiller"]

LONGEST_SECONDS = 300.0
LONGEST_WORDS = 300


class BrokerCommand:
    """The user's command.  Its methods raise ConfigurationError saying what it said when it failed."""

    def __init__(self, command: str) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ConfigurationError(f"--kill-broker {command}: cannot be read: {error}") from error
        if not self._words:
            raise ConfigurationError("--kill-broker: the command is empty")

    def names(self) -> Sequence[str]:
        """The brokers that may be killed."""
        names = [line.strip() for line in self._run("list").splitlines() if line.strip()]
        if not names:
            raise self._failed(["list"], "named no broker")
        return names

    def kill(self, name: str) -> None:
        """It is dead afterwards."""
        self._run("kill", name)

    def start(self, name: str) -> None:
        """It is a whole member again afterwards."""
        self._run("start", name)

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(  # noqa: S603  # what the user gave us to run
                [*self._words, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST_SECONDS,
                start_new_session=True,  # a Ctrl-C in the terminal must not stop a broker's start
            )
        except OSError as error:
            raise self._failed(arguments, f"cannot be run: {error.strerror or error}") from error
        except subprocess.TimeoutExpired as error:
            raise self._failed(arguments, f"had not ended after {LONGEST_SECONDS:.0f} s") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            words = f": {said[0][:LONGEST_WORDS]}" if said else ""
            raise self._failed(arguments, f"ended with {done.returncode}{words}")
        return done.stdout

    def _failed(self, arguments: Sequence[str], what: str) -> ConfigurationError:
        return ConfigurationError(f"--kill-broker: '{shlex.join([*self._words, *arguments])}' {what}")


class BrokerKiller:
    """Kills in a thread of its own, because a broker takes its time to come back.

    command: None: nobody is killed.  every: seconds from when all are whole to the next kill.
    kills: (seconds since 1970, name).  Raises ConfigurationError when the command cannot name a broker.
    """

    def __init__(self, command: BrokerCommand | None, *, every: float, seed: int) -> None:
        self._command, self._every = command, every
        self._names = () if command is None else command.names()
        self._random = random.Random(seed)  # noqa: S311  # repeatable, not secret
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._kill_until_enough, name="killer of brokers")
        self._failure: ConfigurationError | None = None
        self.kills: list[tuple[float, str]] = []

    @property
    def kills_brokers(self) -> bool:
        """Whether it was asked to."""
        return bool(self._names)

    @property
    def is_at_work(self) -> bool:
        """Whether it goes on, or waits for a broker to be whole again."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        if self.kills_brokers:
            self._thread.start()

    def end(self) -> None:
        """Kill nobody any more; whoever is dead is started."""
        self._enough.set()

    def wait(self) -> None:
        """End, and return when whoever was killed is whole again."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what the command failed with."""
        if self._failure is not None:
            raise self._failure

    def _kill_until_enough(self) -> None:
        try:
            while not self._enough.wait(self._every):
                self._kill_one(self._random.choice(self._names))
        except ConfigurationError as error:
            self._failure = error

    def _kill_one(self, name: str) -> None:
        if self._command is None:
            return
        try:
            at = time.time()
            self._command.kill(name)
            self.kills.append((at, name))
        finally:  # also where killing failed: nobody knows how far it came
            self._command.start(name)
