"""The prover's processes: starting, killing, starting again, and leaving none behind.

A fork server that has imported the roles makes a restart cheap.  A process that ends by itself with an error is a
failure of the proof and not hidden.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from reliamq.proving.plan import Plan
from reliamq.proving.roles import run_role

__all__ = ["Fleet", "Member"]


HOPELESS = 10
LONGEST_WORDS = 300


@dataclass(slots=True)
class Member:
    """One process, in the place that it fills: the second worker, say."""

    role: str
    index: int
    process: multiprocessing.context.ForkServerProcess
    started_at: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Role and number."""
        return f"{self.role}-{self.index}"


class Fleet:
    """All processes of a proof.  kills: (seconds since 1970, name), only of those that really died of it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["reliamq.proving.roles"])
        self.members: list[Member] = []
        self.kills: list[tuple[float, str]] = []
        self.crashes: list[str] = []

    def start(self) -> None:
        """Start everybody."""
        counts = {"application": self._plan.applications, "relay": self._plan.relays, "worker": self._plan.workers}
        for role, count in counts.items():
            for index in range(count):
                self.members.append(self._spawn(role, index))

    def _spawn(self, role: str, index: int) -> Member:
        log = str(self._log(role, index))
        process = self._context.Process(target=run_role, args=(role, index, self._plan.to_json(), log), daemon=True)
        process.start()
        return Member(role, index, process)

    def _log(self, role: str, index: int) -> Path:
        return Path(self._plan.folder) / f"{role}-{index}.log"

    def kill(self, member: Member) -> bool:
        """SIGKILL, wait until it is dead, start it again; False if it had ended by itself before."""
        os.kill(member.process.pid or 0, signal.SIGKILL)
        member.process.join()
        died_of_it = member.process.exitcode == -signal.SIGKILL
        if died_of_it:
            self.kills.append((time.time(), member.name))
        self._replace(member)
        return died_of_it

    def _replace(self, member: Member) -> None:
        self.members[self.members.index(member)] = self._spawn(member.role, member.index)

    def look_after(self) -> None:
        """Start again who ended with an error, and note it; an application that has placed its orders may end."""
        for member in [one for one in self.members if one.process.exitcode not in (None, 0)]:
            self.crashes.append(f"{member.name} ended with {member.process.exitcode}{self._last_words(member)}")
            self._replace(member)

    def has_placed_all(self) -> bool:
        """Whether every application has come to its end."""
        return all(one.process.exitcode == 0 for one in self.members if one.role == "application")

    def cannot_place(self) -> bool:
        """Whether applications end by themselves again and again, so that waiting for them has no end."""
        return sum(crash.startswith("application") for crash in self.crashes) >= HOPELESS

    def _last_words(self, member: Member) -> str:
        """The last line of its log, which is the exception where there was one."""
        try:
            lines = self._log(member.role, member.index).read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return ""
        plain = (line.strip(" |+-") for line in reversed(lines))  # less the frame of an exception group
        last = next((line for line in plain if line), "")
        return f": {last[:LONGEST_WORDS]}" if last else ""

    def running(self, role: str | None = None) -> list[Member]:
        """Those alive."""
        return [one for one in self.members if one.process.is_alive() and role in (None, one.role)]

    def stop(self, patience: float) -> None:
        """Ask everybody to finish, and kill who has not within ``patience`` seconds."""
        for member in self.running():
            member.process.terminate()
        deadline = time.monotonic() + patience
        for member in self.members:
            member.process.join(max(0.0, deadline - time.monotonic()))
        self.kill_all()

    def kill_all(self) -> None:
        """At once, without a word; for the end and for Ctrl-C."""
        for member in self.running():
            member.process.kill()
        for member in self.members:
            member.process.join()
