"""How Redis is found: the entry point ``redis`` of the group ``reliamq.backends``."""

from __future__ import annotations

from collections.abc import Mapping

from reliamq.spi import Backend, Capabilities, Durability, Leases, hookimpl
from reliamq_redis.backend import CAPABILITIES, RedisBackend
from reliamq_redis.leases.opening import RedisLeases
from reliamq_redis.settings import SCHEMES


@hookimpl
def reliamq_schemes() -> Mapping[str, Capabilities]:
    """``redis://`` and ``valkey://``, over TLS with an ``s``; ``+sentinel`` and ``+cluster`` behind it."""
    return dict.fromkeys(SCHEMES, CAPABILITIES)


@hookimpl
def reliamq_backend(url: str, settings: Mapping[str, object]) -> Backend:
    """Make the backend; opens nothing."""
    return RedisBackend(url, settings)


@hookimpl
def reliamq_leases(url: str, settings: Mapping[str, object], durability: Durability) -> Leases:
    """Make what keeps leases and locks; opens nothing."""
    return RedisLeases(url, settings, durability)
