"""``reliamq publish``: the lines of a file as messages, each confirmed or reported by its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.progress import Progress

from reliamq.app import Reliamq
from reliamq.cli.target import load_app, refuse, run_async
from reliamq.spi import PublishError
from reliamq.topics import Topic

__all__ = ["publish"]


@dataclass(slots=True)
class _Outcome:
    confirmed: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)


def publish(
    topic: Annotated[str, typer.Argument(help="Name of the topic.")],
    file: Annotated[Path, typer.Option(help="One JSON object a line.")],
    app: Annotated[str, typer.Option(metavar="MODULE:APP", help="The application that has the topic.")],
    message_type: Annotated[str | None, typer.Option("--type", help="Where the topic has several types.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Messages that wait for their confirm at once.")] = 256,
) -> None:
    """Publish a file.  A line that is wrong stops no other; exit code 1 if any was not confirmed."""
    application = load_app(app)
    if topic not in application.topics:
        refuse(f"the application has no topic '{topic}'; it has {', '.join(application.topics) or 'none'}")
    try:
        total = sum(1 for line in _lines(file) if line[1].strip())
    except OSError as error:
        refuse(f"--file {file}: {error.strerror}")
    outcome = run_async(
        lambda: _publish(application, application.topics[topic], file, message_type, concurrency, total)
    )
    for number, fault in sorted(outcome.faults):
        typer.echo(f"{file}, line {number}: {fault}", err=True)
    typer.echo(f"{outcome.confirmed} confirmed, {len(outcome.faults)} not")
    raise typer.Exit(1 if outcome.faults else 0)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as lines:
        yield from enumerate(lines, start=1)


async def _publish(
    app: Reliamq, topic: Topic[Any], file: Path, message_type: str | None, concurrency: int, total: int
) -> _Outcome:
    outcome = _Outcome()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"publishing to {topic.name}", total=total)
        lines = ((number, line) for number, line in _lines(file) if line.strip())

        async def work() -> None:
            for number, line in lines:  # one iterator for all: each line is taken once
                await _publish_line(topic, number, line, message_type, outcome)
                progress.advance(task)

        async with app, anyio.create_task_group() as tasks:
            for _ in range(concurrency):
                tasks.start_soon(work)
    return outcome


async def _publish_line(
    topic: Topic[Any], number: int, line: bytes, message_type: str | None, outcome: _Outcome
) -> None:
    try:
        await topic.publish(topic.parse(line, message_type))
    except PublishError as error:
        certain = "may be stored; repeat it with the same id" if type(error).__name__ == "Unconfirmed" else "not stored"
        outcome.faults.append((number, f"{error} ({certain})"))
    except ValueError as error:
        outcome.faults.append((number, f"{error} (not sent)"))
    else:
        outcome.confirmed += 1
