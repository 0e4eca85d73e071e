"""A relay in a process of its own, which says where it is and waits there to be killed, stopped or let go on.

Run as ``python -m tests.outbox.relay_process DATABASE BROKER STAGE LEASE``.  At the stage ("claimed", "sent" or
"settled") it writes the stage's name to its output and reads a line from its input before it goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

import anyio

from reliamq.backends import open_backend
from reliamq.database import open_engine
from reliamq.outbox import Relay, SqlOutboxStore
from reliamq.spi import OutboxRow, Rejection


class HaltingStore(SqlOutboxStore):
    """The real store, with one place at which it waits."""

    halt_at = ""

    def _halt(self, stage: str) -> None:
        if stage == self.halt_at:
            sys.stdout.write(f"{stage}\n")
            sys.stdout.flush()
            sys.stdin.readline()  # blocks the whole process, as a SIGSTOP or a long collection would

    async def claim(self, relay: str, *, limit: int, lease: timedelta) -> Sequence[OutboxRow]:
        rows = await super().claim(relay, limit=limit, lease=lease)
        if rows:
            self._halt("claimed")
        return rows

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        self._halt("sent")
        await super().settle(relay, confirmed=confirmed, rejected=rejected)
        self._halt("settled")


async def main(database: str, broker: str, stage: str, lease: str) -> None:
    backend = open_backend(broker)
    async with open_engine(database) as engine, backend.publisher() as publisher:
        store = HaltingStore(engine)
        store.halt_at = stage
        await Relay(store, publisher, batch=5, lease=timedelta(seconds=float(lease))).run(anyio.Event())


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
