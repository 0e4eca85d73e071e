"""What is asked of a broker and what was found there.

A :class:`TopicSpec` is what ``declare`` creates and ``audit`` compares the live broker with (S1, S2).  A
:class:`Finding` is one difference, said so that somebody woken at night can act on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum, StrEnum
from typing import Literal

from reliamq.spi.arguments import check_name, need

__all__ = ["Durability", "Finding", "GroupSpec", "Severity", "TopicSpec"]


class Durability(IntEnum):
    """What a confirmation must have survived before it is given (P1); higher includes lower."""

    DEVELOPMENT = 0
    """Accepted by a single node, perhaps in memory.  Loud, never for data that matters (S3)."""
    FSYNCED = 1
    """On the disk of one machine: survives a crash of processes and of the machine, not the loss of its disk."""
    REPLICATED = 2
    """On several machines (three over different racks): survives the loss of any one.  Default for networked brokers.
    """

    @classmethod
    def named(cls, what: str, name: object) -> Durability:
        """The member of that name, in any case; a member is itself.  what: whose parameter, for ConfigurationError.

        A bare number is refused: in a file nobody could tell what it means.
        """
        if isinstance(name, cls):
            return name
        word = name.strip().upper() if isinstance(name, str) else ""
        need(word in cls.__members__, what, f"one of {', '.join(one.name.lower() for one in cls)}", name)
        return cls[word]


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A named subscriber.  Each group gets every message; its members share them.

    start: where a group that is new on an existing topic begins (C9).
    """

    name: str
    start: Literal["earliest", "latest"] = "earliest"

    def __post_init__(self) -> None:
        check_name("group name", self.name)
        need(self.start in ("earliest", "latest"), f"group '{self.name}': start", '"earliest" or "latest"', self.start)


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as the application needs it.

    retention: how long a message is kept after every group has finished it, for groups yet to come.  A message that a
        group has not finished is kept whatever this says.
    max_message_bytes: largest :attr:`~reliamq.spi.Message.size` that is accepted (P6).
    keyed: messages have keys, so order matters.
    """

    name: str
    groups: tuple[GroupSpec, ...] = ()
    durability: Durability = Durability.REPLICATED
    retention: timedelta = timedelta(days=7)
    max_message_bytes: int = 1_048_576
    keyed: bool = True


class Severity(StrEnum):
    """How bad a finding is."""

    LOSES = "loses-messages"
    """Messages can be lost as it stands: an audit fails, an application does not start (S3)."""
    RISKS = "risks-messages"
    """Safe now, lost after one more fault."""
    UNSEEN = "could-not-be-seen"
    """The value could not be read, so nothing is known; never reported as a pass."""
    NOTE = "note"
    """Worth knowing; loses nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing an audit has to say (S2).

    subject: what was looked at (``topic orders``, ``/var/lib/orders.db``).
    setting: which of its values.
    found, required: the live value and the least that is safe, as text.
    why: how messages get lost by it.
    fix: what to do about it.
    passing: whether it passes by itself as a rule, as while a server that was restarted is catching up: a start waits.
    """

    severity: Severity
    subject: str
    setting: str
    found: str
    required: str
    why: str
    fix: str
    promise: str = field(default="S2")
    passing: bool = field(default=False)

    def __str__(self) -> str:
        return f"{self.subject}: {self.setting} is {self.found}, required {self.required}. {self.why} {self.fix}"
