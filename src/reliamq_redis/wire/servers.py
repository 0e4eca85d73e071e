"""The servers that hold the data: who they are just now, and connections to them.

Of redis-py this uses the client of one server.  Its clients for Sentinel and Cluster run a command again whose answer
was lost, and give no hold of the connection on which ``WAIT`` must follow what it waits for; who holds what is
therefore asked here, and asked again after an answer that says so.

Nothing is run twice: an answer that did not come is an error for the caller, who knows what it means.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from pydantic import SecretStr
from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, ConnectionError as ClientConnectionError, NoScriptError, RedisError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry as ClientRetry

from reliamq.spi import BrokerUnavailable
from reliamq.spi.closing import close_in_time
from reliamq_redis.scripts import Script
from reliamq_redis.settings import Deployment, RedisSettings
from reliamq_redis.wire.errors import FAILURES, explained, is_elsewhere, why_not_connected

__all__ = ["Address", "Servers", "open_servers", "unavailable"]

logger = logging.getLogger("reliamq.redis")
Address = tuple[str, int]
SLOTS = 16_384
MOST_CONNECTIONS = 300
"""A lane waits on one of its own, and is written on another: 64 lanes and what else there is."""
DOWN = frozenset({"s_down", "o_down"})
"""What a Sentinel says of a primary that does not answer it (Redis documentation, "Sentinel")."""
Answer = TypeVar("Answer")


class Servers:
    """State of whoever opened it.  Raises ConfigurationError for certificates that cannot be read."""

    def __init__(self, settings: RedisSettings) -> None:
        self._settings = settings
        self._context = settings.ssl_context()
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
            known = {**_credentials(settings.username, settings.password), "db": settings.database}
            client = self._clients[address] = self._made(address, known)
        return client

    def _made(self, address: Address, known: dict[str, Any]) -> Redis:
        """known: what it signs in with."""
        options: dict[str, Any] = {
            "client_name": "reliamq",
            "socket_connect_timeout": self._settings.request_timeout_seconds,
            "socket_timeout": None,  # each answer has a limit of its own
            "retry": ClientRetry(NoBackoff(), 0),
            # With these the client does not look whether an idle connection has ended before it uses it
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        }
        if self._context is not None:
            options |= {"connection_class": _Encrypted, "context": self._context}
        return Redis.from_pool(
            ConnectionPool(host=address[0], port=address[1], max_connections=MOST_CONNECTIONS, **options, **known)
        )

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
        return await self._first_answer([_address(server) for server in self._settings.servers], self._ask_sentinel)

    async def _ask_sentinel(self, address: Address) -> Address:
        settings = self._settings
        user, password = settings.sentinel_username, settings.sentinel_password
        if password is None:
            user, password = settings.username, settings.password
        sentinel = self._made(address, _credentials(user, password))
        try:
            state = await sentinel.execute_command("SENTINEL MASTER", settings.primary)
        except AuthenticationError as error:
            hint = f"the Sentinel does not know user '{user or 'default'}' with that password"
            raise ClientConnectionError(f"{hint}; set 'sentinel_username' and 'sentinel_password'") from error
        finally:
            await _close(sentinel)
        if DOWN & set(state["flags"].split(",")):
            raise ClientConnectionError(f"it does not see primary '{settings.primary}', and nobody else is it yet")
        return str(state["ip"]), int(state["port"])

    async def _find_slots(self) -> list[Address | None]:
        async with self._asking:
            if self._slots is None:
                self._slots = await self._ask_cluster()
            return self._slots

    async def _ask_cluster(self) -> list[Address | None]:
        """Those named, and those met since."""
        named = {_address(server) for server in self._settings.servers}
        return await self._first_answer([*named, *(self._clients.keys() - named)], self._ask_node)

    async def _ask_node(self, address: Address) -> list[Address | None]:
        return _slots(await self.client(address).execute_command("CLUSTER SLOTS"), address)

    async def _first_answer(self, addresses: Sequence[Address], ask: Callable[[Address], Awaitable[Answer]]) -> Answer:
        """Of whichever answers.  Each has its part of the time, so that one that is frozen leaves some for the others.

        Raises BrokerUnavailable.
        """
        settings, faults = self._settings, dict[str, str]()
        for address in random.sample(addresses, len(addresses)):
            try:
                async with asyncio.timeout(settings.request_timeout_seconds / len(addresses)):
                    return await ask(address)
            except FAILURES as error:
                faults[f"{address[0]}:{address[1]}"] = why_not_connected(settings, error)
        raise BrokerUnavailable(settings.url, "; ".join(f"{server}: {fault}" for server, fault in faults.items()))

    async def close(self) -> None:
        """Close all connections.  Bounded."""
        clients, self._clients = self._clients, {}
        await _close(*clients.values())


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


class _Encrypted(SSLConnection):
    """With the context that the settings ask for.  The client's own trusts the system's authorities besides those of
    ``ca_file``, and is made anew for each connection.
    """

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = context

    async def disconnect(self, nowait: bool = False, *details: Any, **named: Any) -> None:
        """nowait: at once; the client would leave the connection open until the server has taken leave, too."""
        if nowait and self._writer is not None:
            self._writer.transport.abort()
        await super().disconnect(nowait, *details, **named)


async def _close(*clients: Redis) -> None:
    """All of them, also when it is cancelled."""
    await close_in_time(_close_quietly(clients), "a connection")


async def _close_quietly(clients: Sequence[Redis]) -> None:
    for client in clients:
        with suppress(RedisError, OSError):
            await client.aclose()


def unavailable(settings: RedisSettings, what: str, error: BaseException) -> BrokerUnavailable:
    """The error for callers, when the server or the way to it failed.  what: was being done."""
    if isinstance(error, BrokerUnavailable):
        return error
    return BrokerUnavailable(settings.url, f"{what}: {explained(settings, error)}")


async def _see(settings: RedisSettings, servers: Servers, address: Address) -> None:
    """That it answers.  Raises BrokerUnavailable."""
    try:
        async with asyncio.timeout(settings.request_timeout_seconds):
            await servers.client(address).execute_command("PING")
    except FAILURES as error:
        why = why_not_connected(settings, error)
        raise BrokerUnavailable(settings.url, f"connecting to {address[0]}:{address[1]}: {why}") from error


@asynccontextmanager
async def open_servers(settings: RedisSettings) -> AsyncIterator[Servers]:
    """Find the servers, see that each primary answers, and close.  Raises BrokerUnavailable."""
    servers = Servers(settings)
    try:
        for address in await servers.holders():
            await _see(settings, servers, address)
        yield servers
    finally:
        await servers.close()
