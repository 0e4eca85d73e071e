"""``reliamq outbox``: what waits, what is parked, and putting it back; sending again what a broker has lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated

import typer
from pydantic import TypeAdapter

from reliamq.app import Reliamq
from reliamq.cli.tables import print_rows
from reliamq.cli.target import load_app, refuse, run_async
from reliamq.cli.whole_message import whole_message
from reliamq.settings.durations import Duration
from reliamq.spi import KeptTopic, KeptWindow, OutboxStatus, ParkedRow

__all__ = ["commands"]

commands = typer.Typer(help="The outbox of the configured database.", no_args_is_help=True)
App = Annotated[str, typer.Option(metavar="MODULE:APP", help="The application.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MOST = 1_000_000
WRITTEN = "how long ago, such as 2h, or a moment, such as 2026-11-25T10:00:00Z"
Moment = datetime | timedelta


@commands.command()
def status(app: App, as_json: Json = False) -> None:
    """How much waits, how old it is, how much is parked, how many sent rows are kept."""

    async def work() -> OutboxStatus:
        async with load_app(app).outbox_store() as store:
            return await store.status()

    found = run_async(work)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "kept_since": found.kept_since and _written(found.kept_since)}))
        return
    age = "" if found.oldest_seconds is None else f", the oldest for {found.oldest_seconds:.0f} s"
    if found.retrying:
        age += f", {found.retrying} of them rejected before, up to {found.attempts} times"
    kept = "" if found.kept_since is None else f"; {found.kept} sent ones kept, since {_written(found.kept_since)}"
    typer.echo(f"{found.waiting} waiting{age}; {found.parked} parked{kept}")


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
            "parked_at": _written(one.parked_at),
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
                _chosen(ids, await store.parked(limit=MOST))
            return await store.requeue(ids or None)

    typer.echo(f"{run_async(work)} requeued")


@commands.command()
def show(message_id: str, app: App) -> None:
    """Show one parked row whole: body, headers, what the broker said."""
    for found in run_async(lambda: _parked(load_app(app), [message_id])):
        typer.echo(json.dumps(_whole(found), indent=2))


@commands.command()
def purge(
    app: App,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[MESSAGE_ID]...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All parked rows.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove parked rows for good: their messages are never sent.  An id that is not parked stops all."""
    if bool(ids) == everything:
        refuse("name message ids, or say --all")
    application = load_app(app)
    parked_rows = run_async(lambda: _parked(application, ids))
    if parked_rows and not yes:
        typer.confirm(f"Remove {len(parked_rows)} messages that were never sent?", abort=True)
    chosen = [one.row.message.id for one in parked_rows]
    typer.echo(f"{run_async(lambda: _purge(application, chosen))} removed")


async def _parked(app: Reliamq, ids: Sequence[str] | None) -> Sequence[ParkedRow]:
    async with app.outbox_store() as store:
        rows = await store.parked(limit=MOST)
    return rows if ids is None else _chosen(ids, rows)


async def _purge(app: Reliamq, ids: Sequence[str]) -> int:
    """Those that were counted: others may have been parked since."""
    async with app.outbox_store() as store:
        return await store.purge(ids)


def _whole(one: ParkedRow) -> dict[str, object]:
    message = one.row.message
    return {
        "message": message.id,
        "topic": message.topic,
        "attempts": one.row.attempts,
        "parked_at": _written(one.parked_at),
        "error": one.error,
        **whole_message(message),
    }


@commands.command()
def replay(
    app: App,
    since: Annotated[str, typer.Option(metavar="TIME", help=f"What was sent from then on: {WRITTEN}.")],
    until: Annotated[str | None, typer.Option(metavar="TIME", help="And before then.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only of this topic.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Send kept rows again, with their ids, after a broker has lost data: consumers pass over what they have had.

    Rows are kept where the setting outbox.keep says for how long.  A running relay sends them.
    """
    begin, end = _moment("--since", since), None if until is None else _moment("--until", until)
    application = load_app(app)
    window = run_async(lambda: _kept(application, begin, end, topic))
    _show(application, window, topic)
    if dry_run or not window.rows:
        typer.echo(f"{window.rows} would be replayed" if dry_run else "0 replayed")
        return
    if not yes:
        typer.confirm(f"Send {window.rows} rows again?", abort=True)
    typer.echo(f"{run_async(lambda: _replay(application, window, topic))} replayed")


async def _kept(app: Reliamq, since: Moment, until: Moment | None, topic: str | None) -> KeptWindow:
    async with app.outbox_store() as store:
        return await store.kept(since=since, until=until, topic=topic)


async def _replay(app: Reliamq, window: KeptWindow, topic: str | None) -> int:
    """Of the window that was shown: two hours ago is another moment once somebody has thought it over."""
    async with app.outbox_store() as store:
        return await store.replay(since=window.since, until=window.until, topic=topic)


def _show(app: Reliamq, window: KeptWindow, topic: str | None) -> None:
    if not window.rows and topic is not None and topic not in app.topics:
        refuse(f"the application has no topic '{topic}'; it has {', '.join(app.topics) or 'none'}")
    if window.since < window.complete_from:
        typer.echo(f"reliamq: what was sent before {_written(window.complete_from)} is gone (outbox.keep)", err=True)
    if window.oldest_sent_at is None:
        typer.echo("reliamq: no sent row is kept", err=True)
    elif window.since < window.oldest_sent_at:
        typer.echo(f"reliamq: the oldest row that is kept was sent at {_written(window.oldest_sent_at)}", err=True)
    if window.rows:
        columns = ("topic", "rows", "first sent", "last sent")
        print_rows(columns, [_row(one) for one in window.topics])


def _row(one: KeptTopic) -> list[str]:
    return [one.topic, str(one.rows), _written(one.first_sent_at), _written(one.last_sent_at)]


def _moment(option: str, text: str) -> Moment:
    """A moment with its time zone, or how long ago.  Exits with 2 for what is neither."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return _length(option, text)
    if moment.tzinfo is None:
        refuse(f"{option} {text}: a moment needs its time zone, such as 2026-11-25T10:00:00Z")
    return moment


def _length(option: str, text: str) -> timedelta:
    try:
        if ":" in text:
            raise ValueError("10:00 would be ten hours")
        length = TypeAdapter(Duration).validate_python(text)
    except ValueError:
        refuse(f"{option} {text}: must be {WRITTEN}")
    if length <= timedelta(0):
        refuse(f"{option} {text}: must be in the past")
    return length


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _chosen(ids: Sequence[str], rows: Sequence[ParkedRow]) -> Sequence[ParkedRow]:
    """The rows of these messages.  Exits with 2 where one is not there."""
    there = {one.row.message.id: one for one in rows}
    if missing := [one for one in dict.fromkeys(ids) if one not in there]:
        refuse(f"there is no parked row of message {', '.join(missing)}; nothing was done")
    return [there[one] for one in dict.fromkeys(ids)]
