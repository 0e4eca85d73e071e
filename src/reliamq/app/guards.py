"""Which guard stands before the handlers of each kind of ``effects=``, made for one run of a worker.

Only what some handler asks for is opened.  How a guard keeps its promise is left to ``reliamq.idempotency``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

import anyio

from reliamq.app.leases import check_kept, open_lease_store
from reliamq.handlers import Handler
from reliamq.idempotency.cleaning import Cleanable
from reliamq.settings import Settings
from reliamq.spi import ConfigurationError, EffectGuard, IdempotencyStore

__all__ = ["Guards", "open_guards"]

CLEAN_EVERY = timedelta(minutes=1)


class Guards:
    """by_effects: the guard for each kind.  The marks that they leave expire and are removed meanwhile (I5)."""

    def __init__(self, by_effects: Mapping[str, EffectGuard], cleaning: Sequence[Cleanable]) -> None:
        self.by_effects, self._cleaning = by_effects, cleaning

    async def clean_for_ever(self) -> None:
        """Remove expired marks now and then.  Cancelled: a chunk is removed or not."""
        from reliamq.idempotency import run_cleaning

        await run_cleaning(self._cleaning, every=CLEAN_EVERY, stop=anyio.Event())


def check_effects(settings: Settings, handlers: Sequence[Handler], lease_store: IdempotencyStore | None) -> None:
    """Raises ConfigurationError when there is no place for what ``handlers`` ask for, or too short a window (I5)."""
    from reliamq.idempotency import check_window

    kept = [handler for handler in handlers if handler.effects != "repeatable"]
    if not kept:
        return
    wanted = {handler.effects for handler in kept}
    if "transaction" in wanted:
        _database(settings)
    if "lease" in wanted and lease_store is None:
        check_kept(settings, 'effects="lease"')
    longest = max(handler.retry.longest() for handler in kept)
    check_window(settings.worker.processed_window, longest, settings.worker.replay_horizon)


@asynccontextmanager
async def open_guards(
    settings: Settings, handlers: Sequence[Handler], lease_store: IdempotencyStore | None
) -> AsyncIterator[Guards]:
    """Open the guards that ``handlers`` need.  Raises ConfigurationError as :func:`check_effects` does."""
    from reliamq.idempotency import RepeatableGuard

    check_effects(settings, handlers, lease_store)
    wanted = {handler.effects for handler in handlers}
    guards: dict[str, EffectGuard] = {"repeatable": RepeatableGuard()}
    cleaning: list[Cleanable] = []
    async with AsyncExitStack() as stack:
        if "transaction" in wanted:
            guards["transaction"] = await _transaction_guard(settings, handlers, stack, cleaning)
        if "lease" in wanted:
            guards["lease"] = await _lease_guard(settings, lease_store, stack, cleaning)
        yield Guards(guards, cleaning)


async def _transaction_guard(
    settings: Settings, handlers: Sequence[Handler], stack: AsyncExitStack, cleaning: list[Cleanable]
) -> EffectGuard:
    from reliamq.database import open_engine, open_sync_engine
    from reliamq.idempotency import TransactionGuard

    url = _database(settings)
    kinds = {handler.is_async for handler in handlers if handler.effects == "transaction"}
    engine = await stack.enter_async_context(open_engine(url))
    sync_engine = stack.enter_context(open_sync_engine(url)) if False in kinds else None
    guard = TransactionGuard(engine, sync_engine, keep=settings.worker.processed_window)
    cleaning.append(guard)
    return guard


async def _lease_guard(
    settings: Settings, store: IdempotencyStore | None, stack: AsyncExitStack, cleaning: list[Cleanable]
) -> EffectGuard:
    from reliamq.idempotency import LeaseGuard

    if store is None:
        store = await stack.enter_async_context(open_lease_store(settings))
    cleaning.append(store)
    guard = LeaseGuard(store, lease=settings.worker.lease, keep=settings.worker.processed_window)
    return await stack.enter_async_context(guard)


def _database(settings: Settings) -> str:
    if settings.database is None:
        raise ConfigurationError(
            'effects="transaction" needs a database to remember processed ids in; set RELIAMQ_DATABASE or '
            "'database' in reliamq.toml"
        )
    return settings.database
