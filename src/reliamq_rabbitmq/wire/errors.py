"""Why a cluster cannot be reached, said so that somebody can act on it."""

from __future__ import annotations

import socket
import ssl

from aiormq.exceptions import AuthenticationError, InvalidFrameError, ProbableAuthenticationError

from reliamq_rabbitmq.settings import RabbitmqSettings

__all__ = ["why_not_connected"]


def why_not_connected(settings: RabbitmqSettings, error: BaseException) -> str:
    """One sentence about a server that could not be connected to: what, why, what to do."""
    user = settings.credentials[0]
    causes = _causes(error)
    if isinstance(error, AuthenticationError | ProbableAuthenticationError):
        return f"it refuses user '{user}': wrong user name or password, or guest from another machine"
    if isinstance(error, InvalidFrameError) and "OpenOk" in str(error):
        host = settings.virtual_host
        return f"there is no virtual host '{host}' for user '{user}'; rabbitmqctl add_vhost, set_permissions"
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            by = f"'{settings.ca_file}'" if settings.ca_file else "the system's authorities"
            return (
                f"its certificate is not accepted by {by} ({cause.verify_message}); set 'ca_file', name it as it does"
            )
        if isinstance(cause, ssl.SSLError):
            return f"no TLS could be agreed ({cause.reason}); use its TLS port, or rabbitmq://"
        if isinstance(cause, socket.gaierror):
            return "there is no host of that name"
        if isinstance(cause, ConnectionRefusedError):
            return "nobody listens there"
        if isinstance(cause, ConnectionResetError):
            return "it closes the connection; if that is its TLS port, write rabbitmqs://"
    if isinstance(error, TimeoutError):
        return f"it does not answer within {settings.request_timeout_seconds:g} s"
    return str(error) or repr(error)


def _causes(error: BaseException) -> list[BaseException]:
    causes = list[BaseException]()
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < 10:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes
