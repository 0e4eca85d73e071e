"""Which functions can be handlers: those whose call runs to the end, and can be named.

A generator's call runs nothing, and what a plain wrapper returns of an ``async def`` nobody would await: messages would
be acknowledged for nothing.  Reading the parameters is left to ``plan``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from reliamq.spi import ConfigurationError, HandlerSignatureError
from reliamq.spi.arguments import need, shown

__all__ = ["check_runs", "label_of"]

MAX_LABEL_CHARACTERS = 200  # the column of processed ids


def label_of(function: Any, name: Any = None) -> str:
    """The handler's identity: the given name, or ``module.qualname``.  Raises ConfigurationError."""
    is_function = inspect.isroutine(function) and not isinstance(function, partial)
    if not is_function or not hasattr(function, "__qualname__"):
        hint = "write a def or async def that calls it" if callable(function) else "put @app.handler(…) before a def"
        raise ConfigurationError(f"a handler must be a function, not {shown(function)}; {hint}")
    label = f"{function.__module__}.{function.__qualname__}"
    if name is None and len(label) > MAX_LABEL_CHARACTERS:
        raise ConfigurationError(f"handler {label}: the name is longer than {MAX_LABEL_CHARACTERS}; give it name=")
    if name is None:
        return label
    fine = isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_LABEL_CHARACTERS
    need(fine, f"handler {label}: name", f"1 to {MAX_LABEL_CHARACTERS} printable characters", name)
    return str(name)


def check_runs(label: str, function: Callable[..., Any]) -> None:
    """Raises HandlerSignatureError for a function whose call would return before its work is done."""
    if _is_generator(inspect.unwrap(function, stop=_is_generator)):
        fault = "is a generator function (it contains yield): calling it runs nothing; use return instead of yield"
        raise HandlerSignatureError(label, None, fault)
    if inspect.iscoroutinefunction(function):
        return
    if inspect.iscoroutinefunction(inspect.unwrap(function, stop=inspect.iscoroutinefunction)):
        raise HandlerSignatureError(
            label,
            None,
            "is a plain function around an async def: nobody would await what it returns; make the wrapper an async "
            "def that awaits the function, or, if it does run it to the end, delete the wrapper's __wrapped__",
        )


def _is_generator(function: Any) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
