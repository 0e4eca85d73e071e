"""What a server's refusal means for a message, and how it is said so that somebody can act on it."""

from __future__ import annotations

import socket
import ssl

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError as ClientConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
    TimeoutError as ClientTimeoutError,
)

from reliamq.spi import RejectionReason
from reliamq_redis.settings import Deployment, RedisSettings

__all__ = ["FAILURES", "explained", "is_elsewhere", "is_forbidden", "said", "why_not_connected", "why_refused"]

FAILURES = (RedisError, OSError, TimeoutError)
"""What the client raises when the server, or the way to it, fails."""
ELSEWHERE = ("READONLY", "MOVED", "ASK", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "LOADING")
"""How answers begin of a server that does not hold the data now; nothing was done (Redis documentation, "Cluster
specification", "Replication").
"""
NOT_NOW = ("NOREPLICAS", "MISCONF", "BUSY", "UNKILLABLE", *ELSEWHERE)
FORBIDDEN_IN_SCRIPT = ("The user executing the script can't", "ACL failure in script")
"""How Redis and Valkey begin to say that a script's own command is not permitted."""


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
    return CLASSES.get(word, word) in ELSEWHERE or isinstance(
        error, ClientConnectionError | ClientTimeoutError | OSError | TimeoutError
    )


def is_forbidden(error: BaseException) -> bool:
    """Whether the user may not do what it asked for."""
    return (
        isinstance(error, NoPermissionError | AuthorizationError)
        or _word(error) == "NOPERM"
        or (isinstance(error, ResponseError) and str(error).startswith(FORBIDDEN_IN_SCRIPT))
    )


def why_refused(error: BaseException) -> RejectionReason:
    """Why the server did not do what it was asked.  error: an answer of the server's."""
    word = _word(error)
    if isinstance(error, OutOfMemoryError) or word == "OOM":
        return RejectionReason.STORAGE_FULL
    if is_forbidden(error) or isinstance(error, AuthenticationError):
        return RejectionReason.REFUSED
    if CLASSES.get(word, word) in NOT_NOW:
        return RejectionReason.UNAVAILABLE
    return RejectionReason.INVALID


def said(error: BaseException) -> str:
    """The error, in words."""
    if isinstance(error, TimeoutError | ClientTimeoutError):
        return "no answer in time"
    # An old server repeats what it does not know, and that may be the password
    return str(error).partition(", with args beginning with")[0] or repr(error)


def explained(settings: RedisSettings, error: BaseException) -> str:
    """The error of a server in one sentence: what, why, what to do."""
    user = settings.username or "default"
    if isinstance(error, AuthenticationError):
        if settings.password is None:
            return "it asks for a user and a password; write user:password@, or set 'username' and 'password'"
        return f"it refuses user '{user}': wrong user name or password"
    if is_forbidden(error):
        return f"user '{user}' may not do that: {said(error)} (ACL SETUSER; docs/redis.md says what reliamq needs)"
    for cause in _causes(error):
        if why := _why_no_connection(settings, cause):
            return why
    return _why_another_kind(settings, error) or said(error)


def why_not_connected(settings: RedisSettings, error: BaseException) -> str:
    """The same about a server that could not be connected to."""
    if isinstance(error, TimeoutError | ClientTimeoutError):
        return "it does not answer in time" + ("; if that is not its TLS port, write redis://" if settings.tls else "")
    if any(isinstance(cause, ConnectionResetError) for cause in _causes(error)):
        return "it ends the connection" + ("" if settings.tls else "; if that is its TLS port, write rediss://")
    return explained(settings, error)


def _why_no_connection(settings: RedisSettings, cause: BaseException) -> str:
    match cause:
        case ssl.SSLCertVerificationError(verify_message=fault):
            by = f"'{settings.ca_file}'" if settings.ca_file else "the system's authorities"
            return f"its certificate is not accepted by {by} ({fault}); set 'ca_file', name it as it does"
        case ssl.SSLError(reason=reason):
            return f"no TLS could be agreed ({reason}); use its TLS port, or redis://"
        case socket.gaierror():
            return "there is no host of that name"
        case ConnectionRefusedError():
            return "nobody listens there"
    return ""


def _why_another_kind(settings: RedisSettings, error: BaseException) -> str:
    """Where the URL takes the server for what it is not."""
    text = str(error)
    if type(error).__name__ == "MovedError" and settings.deployment is not Deployment.CLUSTER:
        return "it is a node of a Cluster; write redis+cluster://"
    if "cluster support disabled" in text:
        return "it is no node of a Cluster; write redis:// or redis+sentinel://"
    if "unknown command 'SENTINEL'" in text:
        return "it is no Sentinel; write redis://"
    if "No such master" in text:
        return f"it watches no primary of the name '{settings.primary}'"
    if "DB index is out of range" in text:
        return f"it has no database {settings.database}"
    return ""


def _causes(error: BaseException) -> list[BaseException]:
    """It, and what is behind it."""
    causes = [error]
    while len(causes) < 10 and (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes
