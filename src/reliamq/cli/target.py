"""What commands have in common: finding the application, running it, and saying clearly why not.

Exit codes that are more than one command's business are here too.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn, TypeVar

import anyio
import typer
from sqlalchemy.exc import SQLAlchemyError

from reliamq.app import Reliamq
from reliamq.cli.importing import TRACEBACK, import_app
from reliamq.settings import masked
from reliamq.spi import BrokerUnavailable, ReliamqError

__all__ = ["REFUSED", "TRY_AGAIN", "Target", "load_app", "load_shared_app", "refuse", "run_async"]

T = TypeVar("T")
REFUSED = 2
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
Target = Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the application is, such as orders:app.")]


def refuse(text: str, code: int = REFUSED) -> NoReturn:
    """Say why on stderr and exit."""
    typer.echo(f"reliamq: {text}", err=True)
    raise typer.Exit(code)


def load_app(target: str) -> Reliamq:
    """Import ``module:app``.  Exits with 2 and a clear line when that fails."""
    try:
        return import_app(target)
    except ReliamqError as error:
        refuse(str(error))


def load_shared_app(target: str) -> Reliamq:
    """The same for a command that is a process of its own beside the application's: a broker in one process's memory
    would be another, empty one here.
    """
    app = load_app(target)
    try:
        shared = app.backend.capabilities.shared_between_processes
    except ReliamqError as error:
        refuse(str(error))
    if not shared:
        refuse(
            f"{masked(app.settings.broker)} is in the memory of one process, and this command is another; "
            "use embedded:///file.db or a networked broker"
        )
    return app


def run_async(function: Callable[[], Awaitable[T]], *, unavailable: int = REFUSED) -> T:
    """Run a command's coroutine; errors that reliamq knows become one line and exit code 2.

    unavailable: the exit code for what may be over soon: a broker or database that cannot be reached.
    """
    with _clear_errors(unavailable):
        return anyio.run(function)


@contextmanager
def _clear_errors(unavailable: int) -> Iterator[None]:
    try:
        yield
    except* (ReliamqError, SQLAlchemyError, OSError) as group:
        if os.environ.get(TRACEBACK):
            traceback.print_exception(group)
        errors = list(_leaves(group))
        transient = not any(isinstance(one, ReliamqError) and not isinstance(one, BrokerUnavailable) for one in errors)
        refuse("; ".join(dict.fromkeys(map(_line, errors))), unavailable if transient else REFUSED)


def _line(error: BaseException) -> str:
    if isinstance(error, SQLAlchemyError):
        return f"the database: {str(error).splitlines()[0]}"
    return str(error) if isinstance(error, ReliamqError) else f"{type(error).__name__}: {error}"


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
