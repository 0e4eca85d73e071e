"""What a server's refusal means for a message: certainly not stored, or nobody knows."""

from __future__ import annotations

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError as ClientConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from reliamq.spi import RejectionReason

__all__ = ["FAILURES", "is_elsewhere", "said", "why_refused"]

FAILURES = (RedisError, OSError, TimeoutError)
"""What the client raises when the server, or the way to it, fails."""
ELSEWHERE = ("READONLY", "MOVED", "ASK", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "LOADING")
"""How answers begin of a server that does not hold the data now; nothing was done (Redis documentation, "Cluster
specification", "Replication").
"""
NOT_NOW = ("NOREPLICAS", "MISCONF", "BUSY", "UNKILLABLE", *ELSEWHERE)


def _word(error: BaseException) -> str:
    """By which the server says what it is; the client takes it off where it has a class for it."""
    return type(error).__name__ if type(error) is not ResponseError else str(error).partition(" ")[0]


CLASSES = {
    "ReadOnlyError": "READONLY",
    "MovedError": "MOVED",
    "AskError": "ASK",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "TryAgainError": "TRYAGAIN",
    "BusyLoadingError": "LOADING",
}


def is_elsewhere(error: BaseException) -> bool:
    """Whether another server holds the data, or none just now: ask anew who does."""
    word = _word(error)
    return CLASSES.get(word, word) in ELSEWHERE or isinstance(error, ClientConnectionError | OSError | TimeoutError)


def why_refused(error: BaseException) -> RejectionReason:
    """Why the server did not do what it was asked.  error: an answer of the server's."""
    word = _word(error)
    if isinstance(error, OutOfMemoryError) or word == "OOM":
        return RejectionReason.STORAGE_FULL
    if isinstance(error, NoPermissionError | AuthorizationError | AuthenticationError) or word == "NOPERM":
        return RejectionReason.REFUSED
    if CLASSES.get(word, word) in NOT_NOW:
        return RejectionReason.UNAVAILABLE
    return RejectionReason.INVALID


def said(error: BaseException) -> str:
    """The error, in words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or repr(error)
