"""What is known of the attempts at one message, as it is written down: in a lane's ledger, and in the headers of one
that waits away from its lane.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Attempts"]

FAILURES, CRASHES = "failures", "crashes"


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

    def headers(self) -> dict[str, str]:
        """As a message carries it that waits elsewhere; names without reliamq's prefix."""
        return {FAILURES: str(self.failures), CRASHES: str(self.crashes)}

    @classmethod
    def carried(cls, headers: Mapping[str, object]) -> Attempts:
        """What a message carries; nothing, where nobody wrote it."""
        return cls(_number(headers.get(FAILURES)), _number(headers.get(CRASHES)))


def _number(text: object) -> int:
    return int(text) if isinstance(text, str) and text.isdecimal() else 0
