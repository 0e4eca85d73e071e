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
        """From a ledger: whose, and what.  Raises ValueError, KeyError, TypeError for what no ledger wrote."""
        values: dict[str, Any] = json.loads(record)
        return values.pop("id"), cls(**values)

    def headers(self, due: float) -> dict[str, str]:
        """As a message carries it that waits elsewhere."""
        return {OURS + FAILURES: str(self.failures), OURS + CRASHES: str(self.crashes), OURS + DUE: str(due)}

    @classmethod
    def carried(cls, headers: Mapping[str, object]) -> Attempts:
        """What a message carries; nothing, where nobody wrote it.  headers: whole."""
        if OURS + DUE not in headers:
            return NONE
        failures, crashes = (int(_number(headers.get(OURS + name))) for name in (FAILURES, CRASHES))
        return cls(failures, crashes, due=_number(headers.get(OURS + DUE)))


def _number(text: object) -> float:
    try:
        return float(text) if isinstance(text, str) else 0.0
    except ValueError:
        return 0.0


NONE = Attempts()
