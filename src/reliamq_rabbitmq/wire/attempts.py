"""What is known of the attempts at one message, as it is written down: in a lane's ledger, and in the headers of one
that waits away from its lane.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reliamq_rabbitmq.wire.records import OURS

__all__ = ["Attempts"]

FURTHEST = 1e12
FAILURES, CRASHES, DUE = "failures", "crashes", "due"


@dataclass(frozen=True, slots=True)
class Attempts:
    """failures, crashes: as a delivery tells them.  begun: a handler was about to start.  apart: it gave way to its
    key's others.  due: wall-clock seconds before which it must not go out; 0: it may.  redelivered: somebody may have
    started on it whose process died.
    """

    failures: int = 0
    crashes: int = 0
    begun: bool = False
    apart: bool = False
    due: float = 0.0
    redelivered: bool = False

    def record(self, message_id: str) -> bytes:
        """As a ledger keeps it."""
        return json.dumps({"id": message_id, **asdict(self)}).encode()

    @classmethod
    def read(cls, record: bytes) -> tuple[str, Attempts]:
        """From a ledger: whose, and what.  Raises ValueError for what no ledger wrote."""
        values = json.loads(record)
        if not isinstance(values, dict) or not isinstance(values.get("id"), str):
            raise ValueError(f"no attempts: {record[:100]!r}")
        known: dict[str, Any] = {
            name: values[name] for name in KINDS if name in values
        }  # a later version may know more
        for name, kind in KINDS.items():
            if not isinstance(known.get(name, kind()), kind | int if kind is float else kind):
                raise ValueError(f"{name} of attempts is {known[name]!r}")
        return values["id"], cls(**known)

    def headers(self, due: float) -> dict[str, str]:
        """As a message carries it that waits elsewhere."""
        return {OURS + FAILURES: str(self.failures), OURS + CRASHES: str(self.crashes), OURS + DUE: str(due)}

    @classmethod
    def carried(cls, headers: Mapping[str, object]) -> Attempts:
        """What a message carries that gave way for long; nothing, where nobody wrote it.  headers: whole."""
        if OURS + DUE not in headers:
            return NONE
        failures, crashes = (int(_number(headers.get(OURS + name))) for name in (FAILURES, CRASHES))
        return cls(failures, crashes, apart=True, due=_number(headers.get(OURS + DUE)))


def _number(text: object) -> float:
    try:
        number = float(text) if isinstance(text, str) else 0.0
    except ValueError:
        return 0.0
    return number if 0 <= number < FURTHEST else 0.0


NONE = Attempts()
KINDS = {"failures": int, "crashes": int, "begun": bool, "apart": bool, "due": float, "redelivered": bool}
