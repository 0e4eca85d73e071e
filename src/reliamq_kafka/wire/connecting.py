"""Why a cluster cannot be reached, said so that somebody can put it right.

The client logs the reason for each server and then raises that it could not connect, without it.  So each server is
asked once more, and the most telling answer is given.  No text made here contains a password, and the client's own log
is kept from showing one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable

from aiokafka import errors
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaError
from aiokafka.protocol.admin import SaslAuthenticateRequest_v0, SaslAuthenticateRequest_v1

from reliamq.spi import BrokerUnavailable
from reliamq_kafka.settings import KafkaSettings

__all__ = ["UNREACHABLE", "close_whole", "unreachable"]

UNREACHABLE = (KafkaError, OSError, ValueError)
"""What connecting raises; ValueError is the client's for a server that fails to prove that it knows the password."""
PROBE_SECONDS, CLOSE_SECONDS = 3.0, 1.0


def _refused(settings: KafkaSettings, _: Exception) -> str:
    return (
        f"it refuses user '{settings.username}' by {settings.mechanism}: wrong user name or password, or the user has "
        "another mechanism; correct the URL (percent-encode '/', '?', '#' and '@') or the setting 'mechanism'"
    )


def _no_mechanism(settings: KafkaSettings, _: Exception) -> str:
    return f"it does not offer {settings.mechanism}; set 'mechanism' to one that its listener has"


def _no_login(settings: KafkaSettings, _: Exception) -> str:
    return "it asks for no user here; use the port of its SASL listener, or leave the user out of the URL"


def _unproven(settings: KafkaSettings, _: Exception) -> str:
    return "it did not prove that it knows the user's password: something else may answer in its place"


def _unknown_certificate(settings: KafkaSettings, error: Exception) -> str:
    vouched = f"'{settings.ca_file}'" if settings.ca_file else "the system's authorities"
    return (
        f"its certificate is not accepted by {vouched}: {getattr(error, 'verify_message', error)}; set 'ca_file' to "
        "the PEM file of who signed it, and name the server as the certificate does"
    )


def _no_tls(settings: KafkaSettings, error: Exception) -> str:
    reason = getattr(error, "reason", None) or "the connection was closed"
    return (
        f"no TLS could be agreed ({reason}); use the port of its TLS listener, or kafka:// where it has none, and "
        "'cert_file' and 'key_file' where it asks for the client's certificate"
    )


def _closed(settings: KafkaSettings, error: Exception) -> str:
    if settings.tls:
        return _no_tls(settings, error)
    return "it closes the connection; where its listener wants TLS, write kafkas://, and a user where it wants SASL"


def _nobody_listens(settings: KafkaSettings, _: Exception) -> str:
    return "nobody listens there; start it, or correct host and port"


def _unknown_host(settings: KafkaSettings, error: Exception) -> str:
    return f"there is no host of that name ({error}); correct the URL"


def _silent(settings: KafkaSettings, _: Exception) -> str:
    return "it does not answer; it hangs, or a firewall is in between"


Reason = Callable[[KafkaSettings, Exception], str]
REASONS: tuple[tuple[type[Exception], Reason], ...] = (  # the most telling first; tried top to bottom
    (errors.SaslAuthenticationFailed, _refused),
    (errors.UnsupportedSaslMechanismError, _no_mechanism),
    (errors.IllegalSaslStateError, _no_login),
    (ssl.SSLCertVerificationError, _unknown_certificate),
    (ssl.SSLError, _no_tls),
    (socket.gaierror, _unknown_host),
    (ConnectionRefusedError, _nobody_listens),
    (ConnectionError, _closed),
    (TimeoutError, _silent),
    (errors.KafkaConnectionError, _closed),
    (ValueError, _unproven),
    (Exception, lambda _, error: repr(error)),
)


async def unreachable(settings: KafkaSettings, error: Exception) -> BrokerUnavailable:
    """The exception to raise after the client could not connect."""
    probes = [asyncio.create_task(_failure(settings, server)) for server in settings.servers]
    done, late = await asyncio.wait(probes, timeout=PROBE_SECONDS)
    for probe in late:
        probe.cancel()
    if late:
        await asyncio.wait(late, timeout=PROBE_SECONDS)
    answers = [probe.result() if probe in done else TimeoutError() for probe in probes]
    failures = [
        (server, answer) for server, answer in zip(settings.servers, answers, strict=True) if answer is not None
    ]
    if not failures:
        return BrokerUnavailable(settings.url, f"cannot be reached: {error}")
    server, failure = min(failures, key=lambda each: _rank(each[1]))
    why = REASONS[_rank(failure)][1](settings, failure)
    return BrokerUnavailable(settings.url, f"cannot be reached: {server}: {why}")


def _rank(error: Exception) -> int:
    return next(place for place, (kind, _) in enumerate(REASONS) if isinstance(error, kind))


async def _failure(settings: KafkaSettings, server: str) -> Exception | None:
    wanted = settings.connection()
    del wanted["bootstrap_servers"]
    host, _, port = server.rpartition(":")
    connection = AIOKafkaConnection(host, int(port), **wanted)
    failure: Exception | None = None
    try:
        await connection.connect()
    except UNREACHABLE as error:
        failure = error
    if failure is None or isinstance(failure, KafkaError):  # there was a connection
        await _closed_for_good(connection)
    return failure


async def _closed_for_good(connection: AIOKafkaConnection) -> None:
    """A broker lets one wait that it refused; leaving earlier would leave the socket behind."""
    closing = connection.close()
    if closing is not None:
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)


async def close_whole(closing: Awaitable[None], client: AIOKafkaClient) -> None:
    """Close what uses a client, and the connections that were made meanwhile.  Cancelled, by the end of the event loop:
    they are closed at once.
    """
    try:
        await closing
    finally:
        if client._sync_task is not None:
            client._sync_task.cancel()
        for connection in client._conns.values():
            connection.close()


class _WithoutPasswords(logging.Filter):
    """At DEBUG the client logs every request, and one of them has the password of SASL PLAIN in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple("a SASL request" if isinstance(arg, _SASL_REQUESTS) else arg for arg in record.args)
        return True


_SASL_REQUESTS = (SaslAuthenticateRequest_v0, SaslAuthenticateRequest_v1)
logging.getLogger("aiokafka.conn").addFilter(_WithoutPasswords())
