"""What an application declares before anything runs: topics, handlers, providers, middleware.

Every contradiction is found here, when it is declared.  Running it is left to ``application``.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

from reliamq.consuming import Middleware
from reliamq.handlers import Backoff, Effects, Handler
from reliamq.spi import ConfigurationError, DuplicateHandler, GroupSpec
from reliamq.spi.arguments import need
from reliamq.topics import Topic

__all__ = ["GroupKey", "Registry"]

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
R = TypeVar("R")
GroupKey = tuple[str, str]  # topic, group

DEFAULT_TIMEOUT = timedelta(seconds=60)


class Registry:
    """Topics by name, handlers by (topic, group), providers by type, middleware from the outermost in."""

    def __init__(self) -> None:
        self.topics: dict[str, Topic[Any]] = {}
        self.handlers: dict[GroupKey, list[Handler]] = {}
        self.middleware: list[Middleware] = []
        self._providers: dict[type, object] = {}

    # --- topics ----------------------------------------------------------------------------------------------------

    def include(self, *topics: Topic[Any]) -> None:
        """Take topics in.  ConfigurationError when another one has the name, or it is none."""
        for topic in topics:
            need(isinstance(topic, Topic), "topic", "a Topic, as app.topic(…) or Topic(…) makes one", topic)
            if self.topics.setdefault(topic.name, topic) is not topic:
                raise ConfigurationError(f"there are two topics named '{topic.name}'")

    def groups_of(self, topic: str) -> Sequence[GroupSpec]:
        """The groups that handlers of the topic name."""
        return [GroupSpec(group) for name, group in self.handlers if name == topic]

    # --- handlers --------------------------------------------------------------------------------------------------

    def handler(
        self,
        topic: Topic[Any],
        *,
        group: str,
        effects: Effects,
        concurrency: int,
        timeout: timedelta,
        retry: Backoff,
        name: str | None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """The decorator behind :meth:`reliamq.Reliamq.handler`."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
            handler = Handler.read(
                function,
                topic=topic,
                group=group,
                effects=effects,
                concurrency=concurrency,
                timeout=timeout,
                retry=retry,
                provided=tuple(self._providers),
                name=name,
            )
            self._add(handler)
            return function

        return register

    def _add(self, handler: Handler) -> None:
        neighbours = self.handlers.setdefault((handler.topic.name, handler.group), [])
        for other in neighbours:
            if other.message_type == handler.message_type:
                raise DuplicateHandler(
                    handler.topic.name, handler.group, handler.message_type, other.name, handler.name
                )
        neighbours.append(handler)

    def concurrency(self, key: GroupKey) -> int:
        """How many deliveries of a group run at once: what its busiest handler asks for."""
        return max(handler.concurrency for handler in self.handlers[key])

    def all_handlers(self) -> Sequence[Handler]:
        """Every handler of every group."""
        return [handler for handlers in self.handlers.values() for handler in handlers]

    # --- middleware ------------------------------------------------------------------------------------------------

    def add_middleware(self, middleware: Middleware) -> None:
        """Put it inside of those that are there.  ConfigurationError for one that could not run."""
        call = middleware if inspect.isroutine(middleware) else getattr(middleware, "__call__", None)  # noqa: B004
        is_async = inspect.iscoroutinefunction(middleware) or inspect.iscoroutinefunction(call)
        need(is_async, "middleware", "an async def with the parameters (delivery, call_next)", middleware)
        try:
            inspect.signature(middleware).bind(None, None)
        except TypeError as error:
            name = getattr(middleware, "__qualname__", repr(middleware))
            raise ConfigurationError(f"middleware {name} must take two arguments, (delivery, call_next)") from error
        self.middleware.append(middleware)

    # --- providers -------------------------------------------------------------------------------------------------

    def provide(self, kind: type, value: object) -> None:
        """Give handlers a parameter of type ``kind``; see :meth:`reliamq.Reliamq.provide`."""
        need(isinstance(kind, type), "provide: the type of the parameter", "a class", kind)
        if kind in self._providers:
            raise ConfigurationError(f"{kind.__name__} is provided twice")
        makes = callable(value) or isinstance(value, AbstractAsyncContextManager | AbstractContextManager)
        wanted = f"a {kind.__name__}, a function that makes one, or a context manager"
        need(isinstance(value, kind) or makes, f"provide: the value for {kind.__name__}", wanted, value)
        self._providers[kind] = value

    @asynccontextmanager
    async def open_providers(self) -> AsyncIterator[Mapping[type, object]]:
        """Make all provided values; those that are context managers are entered, and left in reverse."""
        async with AsyncExitStack() as stack:
            yield {kind: await _made(value, kind, stack) for kind, value in self._providers.items()}


async def _made(value: object, kind: type, stack: AsyncExitStack) -> object:
    made = value
    # What @contextmanager gives can be called too, as a decorator.
    if callable(value) and not isinstance(value, (kind, AbstractAsyncContextManager, AbstractContextManager)):
        made = value()
    if isinstance(made, kind):
        return made
    if inspect.isawaitable(made):
        made = await made
    elif isinstance(made, AbstractAsyncContextManager):
        made = await stack.enter_async_context(made)
    elif isinstance(made, AbstractContextManager):
        made = stack.enter_context(made)
    need(isinstance(made, kind), f"what is provided for {kind.__name__}", f"a {kind.__name__}", made)
    return made
