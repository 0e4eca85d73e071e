"""The user's own frame around a run: an async context manager function that takes the application."""

from __future__ import annotations

import inspect
from contextlib import AbstractAsyncContextManager
from typing import Any

from reliamq.spi import ConfigurationError
from reliamq.spi.arguments import need, shown

__all__ = ["check_lifespan", "lifespan_of"]


def check_lifespan(lifespan: Any) -> None:
    """Raises ConfigurationError for what cannot be a lifespan."""
    need(lifespan is None or callable(lifespan), "lifespan", "a function decorated with @asynccontextmanager", lifespan)
    if inspect.isasyncgenfunction(lifespan) or inspect.iscoroutinefunction(lifespan):
        raise _undecorated(lifespan)


def lifespan_of(lifespan: Any, app: object) -> AbstractAsyncContextManager[object]:
    """What the function gives for the application.  Raises ConfigurationError when it is no async context manager."""
    made = lifespan(app)
    if isinstance(made, AbstractAsyncContextManager):
        return made
    raise ConfigurationError(f"{_undecorated(lifespan)}, not {shown(made)}")


def _undecorated(lifespan: Any) -> ConfigurationError:
    name = getattr(lifespan, "__qualname__", repr(lifespan))
    return ConfigurationError(f"lifespan {name} must be decorated with @asynccontextmanager and yield once")
