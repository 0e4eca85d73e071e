"""Where an application's leases and locks are kept: at the URL that its settings name, or in its database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from reliamq.backends import open_leases
from reliamq.settings import Settings
from reliamq.spi import ConfigurationError, DistributedLock, Durability, IdempotencyStore, Leases

__all__ = ["check_kept", "open_lease_store", "open_locks"]


def check_kept(settings: Settings, what: str) -> None:
    """Raises ConfigurationError when there is nowhere to keep it.  what: needs a place."""
    if settings.leases is None and settings.database is None:
        raise ConfigurationError(
            f"{what} needs a database, or a Redis: set RELIAMQ_DATABASE or RELIAMQ_LEASES, or 'database' or 'leases' "
            "in reliamq.toml"
        )


@asynccontextmanager
async def open_lease_store(settings: Settings) -> AsyncIterator[IdempotencyStore]:
    """Open the store of leases.  Raises ConfigurationError, BrokerUnavailable, DurabilityError."""
    from reliamq.database import open_engine
    from reliamq.idempotency import SqlLeaseStore

    check_kept(settings, 'effects="lease"')
    remember = settings.worker.processed_window
    if settings.leases is not None:
        async with _leases(settings, settings.leases).idempotency_store(remember=remember) as store:
            yield store
    elif settings.database is not None:
        async with open_engine(settings.database) as engine:
            yield SqlLeaseStore(engine, remember=remember)


@asynccontextmanager
async def open_locks(settings: Settings) -> AsyncIterator[DistributedLock | None]:
    """Open the locks, on connections of their own; None: there is nowhere to keep them.  Raises as above."""
    from reliamq.database import open_engine
    from reliamq.idempotency import SqlLock

    if settings.leases is not None:
        async with _leases(settings, settings.leases).lock() as lock:
            yield lock
    elif settings.database is not None:
        async with open_engine(settings.database) as engine:
            yield SqlLock(engine)
    else:
        yield None


def _leases(settings: Settings, url: str) -> Leases:
    """Kept as safely as a networked broker would have to keep messages, whatever broker there is (S3)."""
    required = Durability.REPLICATED if settings.durability is None else settings.durability
    return open_leases(url, settings.backends, durability=required)
