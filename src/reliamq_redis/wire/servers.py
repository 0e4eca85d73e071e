"""The servers that hold the data: who they are just now, and connections to them.

Of redis-py this uses the client of one server, and Sentinel's.  Its clients for Sentinel and Cluster run a command
again whose answer was lost, and give no hold of the connection on which ``WAIT`` must follow what it waits for; who
holds what is therefore asked here, and asked again after an answer that says so.

Nothing is run twice: an answer that did not come is an error for the caller, who knows what it means.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from pydantic import SecretStr
from redis.asyncio import Redis, Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry as ClientRetry

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time
from reliamq_redis.scripts import Script
from reliamq_redis.settings import Deployment, RedisSettings
from reliamq_redis.wire.errors import FAILURES, is_elsewhere, said

__all__ = ["Address", "Servers", "open_servers", "unavailable"]

logger = logging.getLogger("reliamq.redis")
Address = tuple[str, int]
SLOTS = 16_384
MARGIN_SECONDS = 2.0
"""How much later than the server is asked to answer it may do so."""


class Servers:
    """State of whoever opened it."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._clients: dict[Address, Redis] = {}
        self._slots: list[Address | None] | None = None
        self._primary: Address | None = None
        self._asking = asyncio.Lock()

    # --- asking ----------------------------------------------------------------------------------------------------

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any], *, wait: float = 0.0) -> Any:
        """Run a script where its keys are.  Raises the client's errors; see :func:`unavailable`."""
        return await self._answered(keys[0], lambda client: _run(client, script, keys, arguments), wait)

    async def call(self, key: str, *command: Any, wait: float = 0.0) -> Any:
        """Run a command where its key is.  wait: seconds for which the server may take its time."""
        return await self._answered(key, lambda client: client.execute_command(*command), wait)

    async def _answered(self, key: str, ask: Any, wait: float) -> Any:
        try:
            async with asyncio.timeout(self._settings.request_timeout_seconds + wait):
                return await ask(self.client(await self.holder(key)))
        except FAILURES as error:
            if is_elsewhere(error):
                self.forget()
            raise

    def client(self, address: Address) -> Redis:
        """The client of one server."""
        client = self._clients.get(address)
        if client is None:
            settings = self._settings
            client = self._clients[address] = Redis(
                host=address[0],
                port=address[1],
                db=settings.database,
                client_name="reliamq",
                **_credentials(settings.username, settings.password),
                **_timeouts(settings),
                **_encryption(settings),
            )
        return client

    # --- who holds what --------------------------------------------------------------------------------------------

    async def holder(self, key: str) -> Address:
        """The server that has a key.  Raises BrokerUnavailable."""
        if self._settings.deployment is Deployment.STANDALONE:
            return _address(self._settings.servers[0])
        if self._settings.deployment is Deployment.SENTINEL:
            return self._primary or await self._find_primary()
        slots = self._slots or await self._find_slots()
        address = slots[key_slot(key.encode())]
        if address is None:
            self._slots = None
            raise BrokerUnavailable(self._settings.url, "nobody in the Cluster holds a part of the data just now")
        return address

    async def holders(self) -> Sequence[Address]:
        """All primaries.  Raises BrokerUnavailable."""
        if self._settings.deployment is not Deployment.CLUSTER:
            return [await self.holder("")]
        slots = self._slots or await self._find_slots()
        return sorted({address for address in slots if address is not None})

    def forget(self) -> None:
        """Who holds what may be otherwise by now."""
        self._slots = self._primary = None

    async def _find_primary(self) -> Address:
        async with self._asking:
            if self._primary is None:
                self._primary = await self._ask_sentinels()
            return self._primary

    async def _ask_sentinels(self) -> Address:
        settings = self._settings
        user, password = settings.sentinel_username, settings.sentinel_password
        if password is None:
            user, password = settings.username, settings.password
        known = {**_credentials(user, password), **_timeouts(settings), **_encryption(settings)}
        sentinel = Sentinel([_address(server) for server in settings.servers], sentinel_kwargs=known)
        try:
            async with asyncio.timeout(settings.request_timeout_seconds):
                host, port = await sentinel.discover_master(settings.primary or "")
            return str(host), int(port)
        except FAILURES as error:
            raise unavailable(settings, f"asking the Sentinels for '{settings.primary}'", error) from error
        finally:
            for client in sentinel.sentinels:
                await _close(client)

    async def _find_slots(self) -> list[Address | None]:
        async with self._asking:
            if self._slots is None:
                self._slots = await self._ask_cluster()
            return self._slots

    async def _ask_cluster(self) -> list[Address | None]:
        """Whichever of the nodes answers: those named, and those met since."""
        settings, faults = self._settings, dict[str, str]()
        named = [_address(server) for server in settings.servers]
        for address in [*random.sample(named, len(named)), *(set(self._clients) - set(named))]:
            try:
                async with asyncio.timeout(settings.request_timeout_seconds):
                    return _slots(await self.client(address).execute_command("CLUSTER SLOTS"), address)
            except FAILURES as error:
                faults[f"{address[0]}:{address[1]}"] = said(error)
        raise BrokerUnavailable(settings.url, "; ".join(f"{server}: {fault}" for server, fault in faults.items()))

    async def close(self) -> None:
        """Close all connections.  Bounded."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await _close(client)


async def _run(client: Redis, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
    try:
        return await client.execute_command("EVALSHA", script.digest, len(keys), *keys, *arguments)
    except NoScriptError:  # nothing was done; the server knows it from now on, until it starts again
        return await client.execute_command("EVAL", script.text, len(keys), *keys, *arguments)


def _slots(answer: Any, asked: Address) -> list[Address | None]:
    slots: list[Address | None] = [None] * SLOTS
    for first, last, primary, *_ in answer:
        host = primary[0].decode() if isinstance(primary[0], bytes) else primary[0]
        slots[first : last + 1] = [(host or asked[0], primary[1])] * (last + 1 - first)
    return slots


def _address(server: str) -> Address:
    host, _, port = server.rpartition(":")
    return host.strip("[]"), int(port)


def _credentials(user: str | None, password: SecretStr | None) -> dict[str, Any]:
    return {"username": user, "password": password.get_secret_value()} if password is not None else {}


def _timeouts(settings: RedisSettings) -> dict[str, Any]:
    return {
        "socket_connect_timeout": settings.request_timeout_seconds,
        "socket_timeout": None,  # each answer has a limit of its own
        "retry": ClientRetry(NoBackoff(), 0),
    }


def _encryption(settings: RedisSettings) -> dict[str, Any]:
    if not settings.tls:
        return {}
    settings.ssl_context()  # says what is wrong with the certificates
    return {
        "ssl": True,
        "ssl_ca_certs": settings.ca_file,
        "ssl_certfile": settings.cert_file,
        "ssl_keyfile": settings.key_file or settings.cert_file,
    }


async def _close(client: Redis) -> None:
    await close_in_time(_quietly(client), "a connection")


async def _quietly(client: Redis) -> None:
    with suppress(RedisError, OSError):
        await client.aclose()


def unavailable(settings: RedisSettings, what: str, error: BaseException) -> BrokerUnavailable:
    """The error for callers, when the server or the way to it failed.  what: was being done."""
    if isinstance(error, BrokerUnavailable):
        return error
    return BrokerUnavailable(settings.url, f"{what}: {said(error)}")


@asynccontextmanager
async def open_servers(settings: RedisSettings) -> AsyncIterator[Servers]:
    """Find the servers, see that each primary answers, and close.  Raises BrokerUnavailable."""
    servers = Servers(settings)
    try:
        try:
            for address in await servers.holders():
                async with asyncio.timeout(settings.request_timeout_seconds):
                    await servers.client(address).execute_command("PING")
        except FAILURES as error:
            raise unavailable(settings, "connecting", error) from error
        yield servers
    finally:
        await servers.close()
