"""What one proof is to do; crosses from the prover to its processes as JSON.

Only values; nothing here runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

__all__ = ["Plan", "Rule"]


class Rule(StrEnum):
    """A rule that can be broken on purpose, and what happens to those who break it."""

    COMMIT_THEN_SEND = "commit-then-send"
    """No outbox: commit, then publish.  A crash between the two loses the message."""
    FORGET_CONFIRM = "forget-confirm"
    """The outbox row is deleted before the broker confirmed.  A crash while sending loses the message."""
    ACK_FIRST = "ack-first"
    """Acknowledged before the handler ran.  A crash of the worker loses what it held."""
    NO_IDEMPOTENCY = "no-idempotency"
    """The effect without the processed id.  A crash before the acknowledgement doubles it."""

    @property
    def victim(self) -> str:
        """The role whose crash shows it."""
        return {"commit-then-send": "application", "forget-confirm": "relay"}.get(self.value, "worker")


@dataclass(frozen=True, slots=True)
class Plan:
    """broker, database: URLs.  folder: for ledgers.  messages: orders to place, those rolled back included.  keys:
    accounts.

    bodies: a checked copy of the user's own, one JSON object a line, or None.  topic: unique for each run.
    lease_seconds: of deliveries and outbox claims, short, so that a killed process's work goes on soon.
    """

    broker: str
    database: str
    folder: str
    topic: str
    messages: int
    keys: int
    applications: int
    relays: int
    workers: int
    seed: int
    broken: Rule | None = None
    bodies: str | None = None
    lease_seconds: float = 2.0

    @property
    def ledger_folder(self) -> Path:
        """Where each process writes its own ledger."""
        return Path(self.folder) / "ledger"

    def to_json(self) -> str:
        """For the processes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of :meth:`to_json`."""
        values = json.loads(text)
        values["broken"] = None if values["broken"] is None else Rule(values["broken"])
        return cls(**values)
