"""``reliamq dead-letters``: list, show, replay, drop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from reliamq.app import Reliamq
from reliamq.cli.tables import print_rows
from reliamq.cli.target import load_shared_app, refuse, run_async
from reliamq.cli.whole_message import whole_message
from reliamq.spi import DeadLetterRecord

__all__ = ["commands"]

commands = typer.Typer(help="Messages that were given up: look at them, replay them, drop them.", no_args_is_help=True)

App = Annotated[str, typer.Option(metavar="MODULE:APP", help="The application.")]
TopicName = Annotated[str | None, typer.Option("--topic", help="Only of this topic.")]
GroupName = Annotated[str | None, typer.Option("--group", help="Only of this group.")]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[MESSAGE_ID]...", help="Which ones; all must be there.")]
Everything = Annotated[bool, typer.Option("--all", help="All that match --topic and --group.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MOST = 1_000_000


@commands.command("list")
def list_(
    app: App,
    topic: TopicName = None,
    group: GroupName = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """List dead letters, oldest first; into a pipe one line each, parted by tabs."""
    records = run_async(lambda: _find(load_shared_app(app), topic, group, None, limit))
    if as_json:
        typer.echo(json.dumps([_short(record) for record in records]))
        return
    columns = ("message", "topic", "group", "attempts", "died at", "reason")
    print_rows(columns, [[str(value) for value in _short(record).values()] for record in records])


@commands.command()
def show(message_id: str, app: App) -> None:
    """Show one message whole: body, headers, why it was given up."""
    records = run_async(lambda: _find(load_shared_app(app), None, None, [message_id], MOST))
    for record in records:
        typer.echo(json.dumps(_whole(record), indent=2))


@commands.command()
def replay(
    app: App, ids: Ids = None, topic: TopicName = None, group: GroupName = None, everything: Everything = False
) -> None:
    """Deliver again, with the same ids, to the groups that gave up.  Each is removed once its replay is confirmed."""

    async def work() -> int:
        application = load_shared_app(app)
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
        application = load_shared_app(app)
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
    """Those that match.  Refuses ids that are not there, and a topic or group that nobody has."""
    async with app.dead_letters() as desk:
        if ids is not None:
            found = [record for message_id in dict.fromkeys(ids) for record in await desk.show(message_id)]
            return _all_of(ids, [one for one in found if _matches(one, topic, group)])
        records = await desk.list(topic=topic, group=group, limit=limit)
    if not records:
        _check_names(app, topic, group)
    return records


def _matches(record: DeadLetterRecord, topic: str | None, group: str | None) -> bool:
    return topic in (None, record.message.topic) and group in (None, record.group)


def _all_of(ids: Sequence[str], records: Sequence[DeadLetterRecord]) -> Sequence[DeadLetterRecord]:
    there = {record.message.id for record in records}
    if missing := [one for one in dict.fromkeys(ids) if one not in there]:
        refuse(f"there is no dead letter of message {', '.join(missing)}; nothing was done")
    return records


def _check_names(app: Reliamq, topic: str | None, group: str | None) -> None:
    """A misspelt name must not look like "there are none"; dead letters of what was removed are found all the same."""
    if topic is not None and topic not in app.topics:
        refuse(f"the application has no topic '{topic}'; it has {', '.join(app.topics) or 'none'}")
    groups = {one.name for spec in app.specs() if topic in (None, spec.name) for one in spec.groups}
    if group is not None and group not in groups:
        refuse(f"there is no group '{group}'; the application has {', '.join(sorted(groups)) or 'none'}")


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
    return {
        **_short(record),
        "handler": record.handler,
        "position": record.position,
        **whole_message(record.message),
        "traceback": record.traceback.splitlines(),
    }
