"""What commands have in common: finding the application, running it, and saying clearly why not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn, TypeVar

import anyio
import typer
from sqlalchemy.exc import SQLAlchemyError

from reliamq.app import Reliamq
from reliamq.spi import ReliamqError

__all__ = ["REFUSED", "Target", "load_app", "refuse", "run_async"]

T = TypeVar("T")
REFUSED = 2
Target = Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the application is, such as orders:app.")]


def refuse(text: str) -> NoReturn:
    """Say why on stderr and exit with 2."""
    typer.echo(f"reliamq: {text}", err=True)
    raise typer.Exit(REFUSED)


def load_app(target: str) -> Reliamq:
    """Import ``module:app`` with the working directory on the path.  Exits with 2 and a clear line when that fails."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        refuse(f"'{target}' is not MODULE:APP; write something like orders:app")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            refuse(f"there is no module '{error.name}' here or among what is installed")
        refuse(f"module '{module_name}' needs '{error.name}', which is not installed")
    except ReliamqError as error:
        refuse(f"{module_name}: {error}")
    app = getattr(module, attribute, None)
    if not isinstance(app, Reliamq):
        found = "has no" if app is None else f"is a {type(app).__name__}, not a Reliamq: "
        refuse(f"module '{module_name}' {found} '{attribute}'")
    return app


def run_async(function: Callable[[], Awaitable[T]]) -> T:
    """Run a command's coroutine; errors that reliamq knows become one line and exit code 2."""
    with _clear_errors():
        return anyio.run(function)


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except* ReliamqError as group:
        refuse("; ".join(str(error) for error in _leaves(group)))
    except* SQLAlchemyError as group:
        refuse("the database: " + "; ".join(str(error).splitlines()[0] for error in _leaves(group)))


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
