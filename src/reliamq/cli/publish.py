"""``reliamq publish``: the lines of a file as messages, each confirmed or reported by its number.

The file is read once, from its beginning to its end, so a pipe will do.
"""

from __future__ import annotations

import codecs
import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import anyio
import anyio.to_thread
import typer
from rich.console import Console
from rich.progress import Progress

from reliamq.app import Reliamq
from reliamq.cli.target import REFUSED, load_shared_app, refuse, run_async
from reliamq.spi import PublishError, Unconfirmed
from reliamq.topics import Topic, type_name

__all__ = ["publish"]

STDIN = Path("-")
NOT_CONFIRMED = 1


@dataclass(slots=True)
class _Outcome:
    """bad: lines that are no message of the topic.  unconfirmed: those that the broker did not confirm."""

    confirmed: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    unconfirmed: list[tuple[int, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """What may be lost weighs more than what was wrong from the start."""
        if self.unconfirmed:
            return NOT_CONFIRMED
        return REFUSED if self.bad else 0


@dataclass(frozen=True, slots=True)
class _Source:
    """An open file.  total: its bytes, where they are known beforehand."""

    name: str
    lines: BinaryIO
    total: int | None

    async def numbered(self) -> AsyncIterator[tuple[int, bytes]]:
        """Its lines that are not empty, without a byte order mark.  A pipe may let us wait, so a thread does."""
        number = 0
        while line := await self._next():
            number += 1
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, text

    async def _next(self) -> bytes:
        if self.total is not None:
            return self.lines.readline()
        return await anyio.to_thread.run_sync(self.lines.readline, abandon_on_cancel=True)


def publish(
    topic: Annotated[str, typer.Argument(help="Name of the topic.")],
    file: Annotated[Path, typer.Option(help="One JSON object a line; '-' for standard input.", allow_dash=True)],
    app: Annotated[str, typer.Option(metavar="MODULE:APP", help="The application that has the topic.")],
    message_type: Annotated[str | None, typer.Option("--type", help="Where the topic has several types.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Messages that wait for their confirm at once.")] = 256,
) -> None:
    """Publish a file.  A line that is wrong stops no other.

    Exit code 1: the broker did not confirm one.

    2: one is no message of the topic; the others are published.
    """
    application = load_shared_app(app)
    if topic not in application.topics:
        refuse(f"the application has no topic '{topic}'; it has {', '.join(application.topics) or 'none'}")
    _check_type(application.topics[topic], message_type)
    with _open(file) as lines:
        source = _Source(str(file), lines, _size(lines))
        outcome = run_async(lambda: _publish(application, application.topics[topic], source, message_type, concurrency))
    _conclude(source.name, outcome)


def _check_type(topic: Topic[Any], message_type: str | None) -> None:
    types = ", ".join(type_name(model) for model in topic.models)
    if message_type is None and len(topic.models) > 1:
        refuse(f"topic '{topic.name}' has several types, name one with --type: {types}")
    if message_type is not None and not topic.knows(message_type):
        refuse(f"--type {message_type}: topic '{topic.name}' has {types}")


def _open(file: Path) -> AbstractContextManager[BinaryIO]:
    if file == STDIN:
        return nullcontext(sys.stdin.buffer)
    try:
        return file.open("rb")
    except OSError as error:
        refuse(f"--file {file}: {error.strerror}")


def _size(lines: BinaryIO) -> int | None:
    status = os.fstat(lines.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _conclude(name: str, outcome: _Outcome) -> None:
    for number, fault in sorted(outcome.bad + outcome.unconfirmed):
        typer.echo(f"{name}, line {number}: {fault}", err=True)
    faults = len(outcome.bad) + len(outcome.unconfirmed)
    if not outcome.confirmed + faults:
        refuse(f"--file {name}: holds no line")
    typer.echo(f"{outcome.confirmed} confirmed, {faults} not")
    raise typer.Exit(outcome.exit_code)


async def _publish(
    app: Reliamq, topic: Topic[Any], source: _Source, message_type: str | None, concurrency: int
) -> _Outcome:
    outcome = _Outcome()
    free = anyio.Semaphore(concurrency)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"publishing to {topic.name}", total=source.total)

        async def work(number: int, line: bytes) -> None:
            try:
                await _publish_line(app, topic, number, line, message_type, outcome)
            finally:
                free.release()
            progress.advance(task, len(line))

        async with app, anyio.create_task_group() as tasks:
            async for number, line in source.numbered():  # tasks begin in this order, so a key keeps its own
                await free.acquire()
                tasks.start_soon(work, number, line)
    return outcome


async def _publish_line(
    app: Reliamq, topic: Topic[Any], number: int, line: bytes, message_type: str | None, outcome: _Outcome
) -> None:
    try:
        message = topic.message(topic.parse(line, message_type))
    except (PublishError, ValueError) as error:
        outcome.bad.append((number, f"{error} (not sent)"))
        return
    try:
        await app.publish(message)
    except PublishError as error:
        doubt = isinstance(error, Unconfirmed)
        certain = "may be stored; repeat it with the same id" if doubt else "not stored"
        outcome.unconfirmed.append((number, f"{error} ({certain})"))
    else:
        outcome.confirmed += 1
