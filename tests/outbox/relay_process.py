"""A relay in a process of its own, which says where it is and waits there to be killed, stopped or let go on.

Run as ``python -m tests.outbox.relay_process DATABASE BROKER STAGE LEASE [KEEP]``.  At the stage ("claimed", "sent" or
"settled"; "leasing", "settling" and "cleaning": in a transaction) it writes the name of the stage and reads a line
before it goes on.  KEEP: for how many seconds sent rows are kept.  At the stage "replaying" it relays nothing, but
replays, and waits in the middle.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import anyio
from sqlalchemy import event

from reliamq.backends import open_backend
from reliamq.database import open_engine
from reliamq.outbox import Relay, SqlOutboxStore
from reliamq.spi import CLAIM_BYTES, OutboxRow, Rejection

BEFORE = {"replaying": "DELETE", "settling": "UPDATE reliamq_outbox_lease"}
AFTER = {"leasing": "WITH free AS", "cleaning": "DELETE FROM reliamq_outbox_sent"}
"""By the stage, how the statement of a transaction begins before or after which it waits: PostgreSQL's."""


def say_and_wait(stage: str) -> None:
    """Blocks the whole process, as a SIGSTOP or a long collection would."""
    sys.stdout.write(f"{stage}\n")
    sys.stdout.flush()
    sys.stdin.readline()


def halt_at(stage: str, beginning: str, _connection: object, _cursor: object, statement: str, *_: object) -> None:
    """A listener to statements."""
    if statement.startswith(beginning):
        say_and_wait(stage)


class HaltingStore(SqlOutboxStore):
    """The real store, with one place at which it waits."""

    halt_at = ""

    def _halt(self, stage: str) -> None:
        if stage == self.halt_at:
            say_and_wait(stage)

    async def claim(
        self, relay: str, *, limit: int, lease: timedelta, max_bytes: int = CLAIM_BYTES, resting: Sequence[str] = ()
    ) -> Sequence[OutboxRow]:
        rows = await super().claim(relay, limit=limit, lease=lease, max_bytes=max_bytes, resting=resting)
        if rows:
            self._halt("claimed")
        return rows

    async def settle(
        self, relay: str, *, confirmed: Sequence[OutboxRow], rejected: Sequence[tuple[OutboxRow, Rejection]]
    ) -> None:
        self._halt("sent")
        await super().settle(relay, confirmed=confirmed, rejected=rejected)
        self._halt("settled")


async def main(database: str, broker: str, stage: str, lease: str, keep: str = "0") -> None:
    backend = open_backend(broker)
    async with open_engine(database) as engine, backend.publisher() as publisher:
        store = HaltingStore(engine, keep=timedelta(seconds=float(keep)))
        store.halt_at = stage

        for moment, stages in {"before_cursor_execute": BEFORE, "after_cursor_execute": AFTER}.items():
            if stage in stages:
                event.listen(engine.sync_engine, moment, partial(halt_at, stage, stages[stage]))
        if stage == "replaying":
            await store.replay(since=timedelta(hours=1))
            return
        await Relay(store, publisher, batch=5, lease=timedelta(seconds=float(lease))).run(anyio.Event())


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
