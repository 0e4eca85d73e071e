"""Tests here run on Redis 7 and on Valkey 8, each on its own servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from reliamq_redis.settings import RedisSettings, read_settings
from tests.redis.steps import declare
from tests.servers.redis import RedisServers

KINDS = ("redis", "valkey")


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in KINDS])
def servers(request: pytest.FixtureRequest) -> RedisServers:
    """A test that breaks them mends them."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, RedisServers)
    return found


@pytest.fixture
def whole(servers: RedisServers) -> Iterator[RedisServers]:
    """Whole, and made so again afterwards."""
    servers.wait_until_whole()
    yield servers
    servers.start()
    servers.wait_until_whole()


@pytest.fixture
def settings(servers: RedisServers) -> RedisSettings:
    """Of the pair."""
    return read_settings(servers.url, {})


@pytest.fixture
def proxied(servers: RedisServers) -> RedisSettings:
    """Of the pair, through the proxy in front of its primary."""
    return read_settings(servers.proxied_url, {"request_timeout_seconds": 2})


@pytest.fixture
async def topic(settings: RedisSettings) -> str:
    """With the group ``g``."""
    return await declare(settings, "g")
