"""Connections that end, or are broken off in the middle: nobody gets another's answer, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import uuid
import warnings

import anyio
import anyio.lowlevel
import pytest

from reliamq_redis.settings import RedisSettings, read_settings
from reliamq_redis.wire.errors import FAILURES
from reliamq_redis.wire.servers import Servers, open_servers
from tests.servers.redis import RedisServers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
def key() -> str:
    return f"test-{uuid.uuid4()}"


async def test_a_connection_that_the_server_has_ended_is_not_used_again(
    servers: RedisServers, settings: RedisSettings, key: str
) -> None:
    async with open_servers(settings) as opened:
        await asyncio.gather(*[opened.call(key, "SET", key, "there") for _ in range(10)])  # ten connections
        with servers.client(servers.primary) as primary:
            for each in primary.client_list():
                if each["name"] == "reliamq" and each["cmd"].lower() == "set":
                    primary.client_kill_filter(_id=each["id"])
        await anyio.sleep(0.1)
        for _ in range(20):
            assert await opened.call(key, "GET", key) == b"there"


@pytest.mark.parametrize("database", [0, 3])
async def test_an_answer_to_a_handshake_that_was_broken_off_is_nobodys(
    servers: RedisServers, settings: RedisSettings, key: str, database: int
) -> None:
    """A server that is slow to answer is asked again, perhaps on the same connection."""
    settings = settings.model_copy(update={"request_timeout_seconds": 1.0, "database": database})
    async with open_servers(settings) as opened:
        await opened.call(key, "SET", key, "there")
        with servers.client(servers.primary) as primary:
            primary.client_kill_filter(_type="normal", skipme=True)
        await anyio.sleep(0.1)
        servers.primary.pause()
        try:
            with pytest.raises(FAILURES):
                await opened.call(key, "GET", key)
            asking = asyncio.create_task(opened.call(key, "GET", key))
            await anyio.sleep(0.3)
        finally:
            servers.primary.resume()
        assert await asking == b"there"
        assert await opened.call(key, "GET", key) == b"there"


async def test_whoever_breaks_off_leaves_no_connection_behind(
    servers: RedisServers, settings: RedisSettings, key: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with open_servers(settings) as opened:
            for number in range(40):
                with anyio.move_on_after(0.0004 * number):
                    await asyncio.gather(*[opened.call(key, "SET", key, f"{each}") for each in range(3)])
                await opened.call(key, "SET", key, "whole")
                assert await opened.call(key, "GET", key) == b"whole"
        gc.collect()
        await anyio.lowlevel.checkpoint()


async def test_all_connections_are_closed_also_where_that_is_cancelled(servers: RedisServers, key: str) -> None:
    """Of several servers: nothing is left open at the later ones."""
    opened = Servers(read_settings(servers.cluster_url, {}))
    await asyncio.gather(*[opened.call(f"{key}-{number}", "GET", f"{key}-{number}") for number in range(20)])
    closing = asyncio.create_task(opened.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    del opened
    gc.collect()  # what is open still is a warning, and so an error
