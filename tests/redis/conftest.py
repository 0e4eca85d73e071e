"""Tests here run on Redis 7 and on Valkey 8, each on its own servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reliamq_redis.settings import RedisSettings, read_settings
from tests.redis.steps import declare
from tests.servers.redis import RedisServers

KINDS = ("redis", "valkey")
ON_BOTH = {"test_publishing", "test_security"}
"""Where Valkey does something else: it confirms from its disks, and is behind a tunnel.  Of the rest its turn is a long
form.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long forms."""
    for item in items:
        here = item.path.parent == Path(__file__).parent and item.path.stem not in ON_BOTH
        if here and "valkey" in item.name.partition("[")[2]:
            item.add_marker(pytest.mark.slow)


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
