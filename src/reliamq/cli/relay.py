"""``reliamq relay``: sends what the outbox holds, and says how much."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

import anyio

from reliamq.app import Reliamq
from reliamq.cli.serving import serve
from reliamq.cli.target import Target, load_shared_app, run_async
from reliamq.settings import masked
from reliamq.spi import CLAIM_BYTES, KeptWindow, OutboxRow, OutboxStatus, OutboxStore, ParkedRow, Rejection

__all__ = ["relay"]

logger = logging.getLogger("reliamq.relay")
REPORT_EVERY = 10.0


def relay(target: Target) -> None:
    """Relay the outbox of the configured database until SIGTERM or Ctrl-C.  Run as many as you like."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = load_shared_app(target)
    run_async(lambda: serve(app, lambda stop: _relay(app, stop)))


async def _relay(app: Reliamq, stop: anyio.Event) -> None:
    async with app.outbox_store() as store, anyio.create_task_group() as tasks:
        counted = _Counted(store)
        tasks.start_soon(_report_for_ever, counted)
        logger.info("relaying from %s to %s", masked(app.settings.database or ""), masked(app.settings.broker))
        try:
            await app.run_relay(stop, store=counted)
        finally:
            counted.report()
        tasks.cancel_scope.cancel()


async def _report_for_ever(counted: _Counted) -> None:
    while True:
        await anyio.sleep(REPORT_EVERY)
        counted.report()


class _Counted:
    """An outbox whose settlements are counted."""

    def __init__(self, store: OutboxStore) -> None:
        self._store = store
        self._confirmed = self._rejected = 0

    def report(self) -> None:
        """Say what was settled since the last time, if anything was."""
        if self._confirmed or self._rejected:
            logger.info("%d sent and confirmed, %d rejected", self._confirmed, self._rejected)
        self._confirmed = self._rejected = 0

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        """Counted once it is written."""
        await self._store.settle(relay, confirmed=confirmed, rejected=rejected)
        self._confirmed += len(confirmed)
        self._rejected += len(rejected)

    async def claim(
        self, relay: str, *, limit: int, lease: timedelta, max_bytes: int = CLAIM_BYTES, resting: Sequence[str] = ()
    ) -> Sequence[OutboxRow]:
        """As it is."""
        return await self._store.claim(relay, limit=limit, lease=lease, max_bytes=max_bytes, resting=resting)

    async def status(self) -> OutboxStatus:
        """As it is."""
        return await self._store.status()

    async def parked(self, *, limit: int) -> Sequence[ParkedRow]:
        """As it is."""
        return await self._store.parked(limit=limit)

    async def requeue(self, message_ids: Sequence[str] | None) -> int:
        """As it is."""
        return await self._store.requeue(message_ids)

    async def purge(self, message_ids: Sequence[str] | None) -> int:
        """As it is."""
        return await self._store.purge(message_ids)

    async def kept(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> KeptWindow:
        """As it is."""
        return await self._store.kept(since=since, until=until, topic=topic)

    async def replay(
        self, *, since: datetime | timedelta, until: datetime | timedelta | None = None, topic: str | None = None
    ) -> int:
        """As it is."""
        return await self._store.replay(since=since, until=until, topic=topic)

    async def clean(self, *, limit: int) -> int:
        """As it is."""
        return await self._store.clean(limit=limit)
