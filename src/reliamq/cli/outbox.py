"""``reliamq outbox``: what waits, what is parked, and putting it back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from reliamq.cli.tables import print_rows
from reliamq.cli.target import load_app, refuse, run_async
from reliamq.spi import OutboxStatus, ParkedRow

__all__ = ["commands"]

commands = typer.Typer(help="The outbox of the configured database.", no_args_is_help=True)
App = Annotated[str, typer.Option(metavar="MODULE:APP", help="The application.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MOST = 1_000_000


@commands.command()
def status(app: App, as_json: Json = False) -> None:
    """How much waits, how old it is, how much is parked."""

    async def work() -> OutboxStatus:
        async with load_app(app).outbox_store() as store:
            return await store.status()

    found = run_async(work)
    if as_json:
        values = {"waiting": found.waiting, "parked": found.parked, "oldest_seconds": found.oldest_seconds}
        typer.echo(json.dumps(values))
        return
    age = "" if found.oldest_seconds is None else f", the oldest for {found.oldest_seconds:.0f} s"
    typer.echo(f"{found.waiting} waiting{age}; {found.parked} parked")


@commands.command()
def parked(
    app: App,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """Rows that the broker rejected to the last attempt; into a pipe one line each, parted by tabs."""

    async def work() -> Sequence[ParkedRow]:
        async with load_app(app).outbox_store() as store:
            return await store.parked(limit=limit)

    rows = [
        {
            "message": one.row.message.id,
            "topic": one.row.message.topic,
            "attempts": str(one.row.attempts),
            "parked_at": one.parked_at.isoformat(timespec="seconds"),
            "error": one.error,
        }
        for one in run_async(work)
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    print_rows(("message", "topic", "attempts", "parked at", "error"), [list(row.values()) for row in rows])


@commands.command()
def requeue(
    app: App,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[MESSAGE_ID]...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All parked rows.")] = False,
) -> None:
    """Send parked rows again, their attempts counted anew.  An id that is not parked stops all."""
    if bool(ids) == everything:
        refuse("name message ids, or say --all")

    async def work() -> int:
        async with load_app(app).outbox_store() as store:
            if ids:
                _check_ids(ids, await store.parked(limit=MOST))
            return await store.requeue(ids or None)

    typer.echo(f"{run_async(work)} requeued")


def _check_ids(ids: Sequence[str], rows: Sequence[ParkedRow]) -> None:
    there = {one.row.message.id for one in rows}
    if missing := [one for one in dict.fromkeys(ids) if one not in there]:
        refuse(f"there is no parked row of message {', '.join(missing)}; nothing was done")
