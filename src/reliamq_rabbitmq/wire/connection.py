"""Connecting to whichever node of the cluster answers, and answers that come in time or not at all.

The client raises a cancellation where a connection dies silently, although nobody cancelled; here that is the
:class:`ConnectionLost` that it is.  Reconnecting is left to those who use a connection, because what was under way on
the old one must be judged first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from aiormq.connection import Connection
from aiormq.exceptions import AMQPError
from yarl import URL

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time
from reliamq_rabbitmq.settings import RabbitmqSettings
from reliamq_rabbitmq.wire.channel import Channel, ConnectionLost, open_channel
from reliamq_rabbitmq.wire.errors import why_not_connected

__all__ = [
    "FAILURES",
    "answered",
    "close",
    "close_channel",
    "connect",
    "open_connection",
    "short_channel",
    "unavailable",
]

logger = logging.getLogger("reliamq.rabbitmq")
CLOSE_SECONDS = 5.0
FAILURES = (AMQPError, OSError, RuntimeError, TimeoutError)
"""What the client raises when the broker or the way to it fails; RuntimeError for a connection that is closed."""
T = TypeVar("T")


async def answered(awaitable: Awaitable[T], seconds: float) -> T:
    """The client's answer.  Raises TimeoutError after ``seconds``, ConnectionLost, and what the client raises."""
    task = asyncio.current_task()
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except asyncio.CancelledError as error:
        if task is not None and task.cancelling():
            raise
        raise ConnectionLost(f"the connection ended: {error!r}") from error


async def connect(settings: RabbitmqSettings, purpose: str) -> Connection:
    """A connection to one of the servers.  purpose: by which the broker's operators tell it from others.

    Raises BrokerUnavailable naming each server's fault.  Cancelled: nothing stays open.
    """
    servers = random.sample(settings.servers, len(settings.servers))
    context, faults = settings.ssl_context(), dict[str, list[str]]()
    for server in servers:
        connection = Connection(
            _url(settings, server), context=context, client_properties={"connection_name": f"reliamq {purpose}"}
        )
        try:
            await answered(connection.connect(), settings.request_timeout_seconds)
        except FAILURES as error:
            faults.setdefault(why_not_connected(settings, error), []).append(server)
            await close(connection)  # it may have been opened in the very moment in which time was over
        except BaseException:
            await close(connection)
            raise
        else:
            return connection
    said = "; ".join(f"{', '.join(sorted(at))}: {fault}" for fault, at in faults.items())
    raise BrokerUnavailable(settings.url, said)


def _url(settings: RabbitmqSettings, server: str) -> URL:
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    user, password = settings.credentials
    return URL.build(
        scheme="amqps" if settings.tls else "amqp",
        host=host,
        port=int(port),
        user=user,
        password=password,
        path="/" if settings.virtual_host == "/" else "/" + settings.virtual_host.replace("/", "%2F"),
        query={"heartbeat": settings.heartbeat_seconds},
    )


def _said(error: BaseException) -> str:
    return str(error) or repr(error)


async def close(connection: Connection) -> None:
    """Close it, in a cancelled task too, within a limit; never raises for what the client says."""
    await close_in_time(_quietly(connection.close(ConnectionLost("closed"))), "a connection")


async def _quietly(closing: Awaitable[None]) -> None:
    with suppress(*FAILURES):
        await answered(closing, CLOSE_SECONDS)


@asynccontextmanager
async def open_connection(settings: RabbitmqSettings, purpose: str) -> AsyncIterator[Connection]:
    """Connect and close.  Raises BrokerUnavailable."""
    connection = await connect(settings, purpose)
    try:
        yield connection
    finally:
        await close(connection)


@asynccontextmanager
async def short_channel(
    connection: Connection, settings: RabbitmqSettings, *, confirms: bool = False
) -> AsyncIterator[Channel]:
    """A channel for few questions; the broker closes it when an answer is no."""
    channel = await answered(open_channel(connection, confirms=confirms), settings.request_timeout_seconds)
    try:
        yield channel
    finally:
        await close_channel(channel)


async def close_channel(channel: Channel) -> None:
    """As :func:`close`."""
    await close_in_time(_quietly(channel.finish()), "a channel")


def unavailable(settings: RabbitmqSettings, what: str, error: BaseException) -> BrokerUnavailable:
    """The error for callers, when the broker or the way to it failed.  what: was being done."""
    if isinstance(error, BrokerUnavailable):
        return error
    return BrokerUnavailable(settings.url, f"{what}: {_said(error)}")
