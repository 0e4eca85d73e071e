"""``reliamq dead-letters``: list, show, replay, drop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from reliamq.app import Reliamq
from reliamq.cli.target import load_app, refuse, run_async
from reliamq.spi import DeadLetterRecord

__all__ = ["commands"]

commands = typer.Typer(help="Messages that were given up: look at them, replay them, drop them.", no_args_is_help=True)

App = Annotated[str, typer.Option(metavar="MODULE:APP", help="The application.")]
TopicName = Annotated[str | None, typer.Option("--topic", help="Only of this topic.")]
GroupName = Annotated[str | None, typer.Option("--group", help="Only of this group.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[MESSAGE_ID]...", help="Which ones.")]
Everything = Annotated[bool, typer.Option("--all", help="All that match --topic and --group.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MOST = 1_000_000


@commands.command("list")
def list_(app: App, topic: TopicName = None, group: GroupName = None, limit: int = 100, as_json: Json = False) -> None:
    """List dead letters, oldest first."""
    records = run_async(lambda: _find(load_app(app), topic, group, None, limit))
    if as_json:
        typer.echo(json.dumps([_short(record) for record in records]))
        return
    table = Table()
    for column in ("message", "topic", "group", "attempts", "died at", "reason"):
        table.add_column(column, overflow="fold")
    for record in records:
        table.add_row(*(str(value) for value in _short(record).values()))
    Console().print(table)


@commands.command()
def show(message_id: str, app: App) -> None:
    """Show one message whole: body, headers, why it was given up."""
    records = run_async(lambda: _find(load_app(app), None, None, [message_id], MOST))
    if not records:
        refuse(f"there is no dead letter of message {message_id}")
    for record in records:
        typer.echo(json.dumps(_whole(record), indent=2))


@commands.command()
def replay(
    app: App, ids: Ids = None, topic: TopicName = None, group: GroupName = None, everything: Everything = False
) -> None:
    """Deliver again, with the same ids, to the groups that gave up.  Each is removed once its replay is confirmed."""

    async def work() -> int:
        application = load_app(app)
        records = await _find(application, topic, group, _chosen(ids, everything), MOST)
        async with application, application.dead_letters() as desk:
            return await desk.replay(records)

    typer.echo(f"{run_async(work)} replayed")


@commands.command()
def drop(
    app: App, ids: Ids = None, topic: TopicName = None, group: GroupName = None, everything: Everything = False
) -> None:
    """Remove for good."""

    async def work() -> int:
        application = load_app(app)
        records = await _find(application, topic, group, _chosen(ids, everything), MOST)
        async with application.dead_letters() as desk:
            return await desk.drop(records)

    typer.echo(f"{run_async(work)} dropped")


def _chosen(ids: list[str] | None, everything: bool) -> list[str] | None:
    if bool(ids) == everything:
        refuse("name message ids, or say --all")
    return ids or None


async def _find(
    app: Reliamq, topic: str | None, group: str | None, ids: Sequence[str] | None, limit: int
) -> Sequence[DeadLetterRecord]:
    async with app.dead_letters() as desk:
        if ids is None:
            return await desk.list(topic=topic, group=group, limit=limit)
        found = [record for message_id in ids for record in await desk.show(message_id)]
    return [one for one in found if topic in (None, one.message.topic) and group in (None, one.group)]


def _short(record: DeadLetterRecord) -> dict[str, Any]:
    return {
        "message": record.message.id,
        "topic": record.message.topic,
        "group": record.group,
        "attempts": record.attempts,
        "died_at": record.died_at.isoformat(timespec="seconds"),
        "reason": record.reason,
    }


def _whole(record: DeadLetterRecord) -> dict[str, Any]:
    message = record.message
    return {
        **_short(record),
        "handler": record.handler,
        "position": record.position,
        "type": message.type,
        "source": message.source,
        "time": message.time.isoformat(),
        "key": None if message.key is None else message.key.decode(errors="backslashreplace"),
        "sequence": message.sequence,
        "headers": dict(message.headers),
        "body": message.body.decode(errors="backslashreplace"),
        "traceback": record.traceback.splitlines(),
    }
