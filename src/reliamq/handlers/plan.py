"""A handler's signature, read once and compiled to a plan.

Each parameter is resolved by its type when the handler is registered: the message's model, the delivery, the database
session, the fencing token, anything provided to the application.  What cannot be resolved is refused there and then
with the parameter's name. Calling the handler safely is left to ``reliamq.consuming``.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from reliamq.handlers.backoff import Backoff
from reliamq.handlers.functions import check_runs, label_of
from reliamq.spi import Delivery, FencingToken, HandlerSignatureError
from reliamq.spi.arguments import check_name, check_time, check_whole_number, need
from reliamq.topics import Topic, type_name

__all__ = ["Arguments", "Effects", "Handler", "Providers", "check_options"]

Effects = Literal["transaction", "lease", "repeatable"]
Arguments = Callable[[BaseModel, Delivery, Any], dict[str, Any]]
Providers = Mapping[type, object]

_MODEL, _DELIVERY, _RESOURCE = range(3)
_PLAIN_SESSION = ("a Session", "an async def", "an AsyncSession", "a plain def")
_ASYNC_SESSION = ("an AsyncSession", "a plain def", "a sqlalchemy.orm.Session", "an async def")


@dataclass(frozen=True, slots=True)
class Handler:
    """One registered handler.

    function: the user's own, unchanged.  name: ``module.qualname``, part of the processed id (I1), so renaming a
    handler makes its processed ids unknown; give ``name=`` to keep them.
    model: the kind of message it takes.  timeout: of one attempt.
    slots: which parameter gets what of each message.  provided: which parameter gets which provided type.
    """

    function: Callable[..., Any]
    name: str
    topic: Topic[Any]
    group: str
    model: type[BaseModel]
    effects: Effects
    concurrency: int
    timeout: timedelta
    retry: Backoff
    slots: tuple[tuple[str, int], ...]
    provided: tuple[tuple[str, type], ...]

    @property
    def message_type(self) -> str:
        """The name of the message type that it handles."""
        return type_name(self.model)

    @property
    def is_async(self) -> bool:
        """Whether it runs on the event loop; a plain function runs in a worker thread."""
        return inspect.iscoroutinefunction(self.function)

    def arguments(self, providers: Mapping[type, object]) -> Arguments:
        """Compile the function that makes the keyword arguments of one call.  providers: the values by type."""
        constants = {name: providers[kind] for name, kind in self.provided}
        slots = self.slots

        def arguments(model: BaseModel, delivery: Delivery, resource: Any) -> dict[str, Any]:
            values = (model, delivery, resource)
            made = {name: values[index] for name, index in slots}
            made.update(constants)
            return made

        return arguments

    @classmethod
    def read(
        cls,
        function: Callable[..., Any],
        *,
        topic: Topic[Any],
        group: str,
        effects: Effects,
        concurrency: int,
        timeout: timedelta,
        retry: Backoff,
        provided: Sequence[type],
        name: str | None = None,
    ) -> Handler:
        """Read ``function``'s signature.  Raises HandlerSignatureError naming the parameter, ConfigurationError
        otherwise.
        """
        label = label_of(function, name)
        check_runs(label, function)
        check_options(f"handler {label}", group, effects, concurrency, timeout, retry)
        reader = _SignatureReader(label, function, topic, effects, provided)
        slots, constants, model = reader.read()
        return cls(function, label, topic, group, model, effects, concurrency, timeout, retry, slots, constants)


def check_options(what: str, group: object, effects: object, concurrency: int, timeout: object, retry: object) -> None:
    """Raises ConfigurationError naming the option that is wrong.  what: whose they are."""
    check_name(f"{what}: group", group)
    need(effects in typing.get_args(Effects), f"{what}: effects", f"one of {typing.get_args(Effects)}", effects)
    check_whole_number(f"{what}: concurrency", concurrency, least=1)
    check_time(f"{what}: timeout", timeout)
    need(isinstance(retry, Backoff), f"{what}: retry", "a Backoff, such as Backoff(attempts=3)", retry)


class _SignatureReader:
    """Goes through one signature; lives only while a handler is registered."""

    def __init__(
        self, label: str, function: Callable[..., Any], topic: Topic[Any], effects: Effects, provided: Sequence[type]
    ) -> None:
        self._label, self._function, self._topic = label, function, topic
        self._effects, self._provided = effects, provided
        self._slots: list[tuple[str, int]] = []
        self._constants: list[tuple[str, type]] = []
        self._model: type[BaseModel] | None = None

    def read(self) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, type], ...], type[BaseModel]]:
        hints = self._hints()
        for parameter in self._parameters():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise self._fault(parameter.name, "must be an ordinary named parameter")
            if parameter.name not in hints:
                raise self._fault(parameter.name, "needs a type annotation, because parameters are filled by type")
            self._resolve(parameter.name, hints[parameter.name], parameter.default is not parameter.empty)
        if self._model is None:
            models = " or ".join(model.__name__ for model in self._topic.models)
            raise self._fault(None, f"has no parameter for the message; topic '{self._topic.name}' has {models}")
        return tuple(self._slots), tuple(self._constants), self._model

    def _parameters(self) -> Sequence[inspect.Parameter]:
        try:
            return list(inspect.signature(self._function).parameters.values())
        except (ValueError, TypeError) as error:  # of a function that is not written in Python
            raise self._fault(None, f"has a signature that cannot be read: {error}") from error

    def _hints(self) -> dict[str, Any]:
        try:
            return typing.get_type_hints(self._function)
        except Exception as error:  # annotations that are text are evaluated here, and may raise anything
            fault = f"has an annotation that cannot be resolved where it stands: {type(error).__name__}: {error}"
            raise self._fault(None, fault) from error

    def _resolve(self, name: str, hint: Any, has_default: bool) -> None:
        if isinstance(hint, type) and issubclass(hint, BaseModel) and hint in self._topic.models:
            self._take_model(name, hint)
        elif hint is Delivery:
            self._slots.append((name, _DELIVERY))
        elif hint in (AsyncSession, Session):
            self._take_session(name, hint)
        elif hint is FencingToken:
            self._need(name, "lease", "a fencing token")
        elif any(hint is kind for kind in self._provided):  # a hint need not be hashable
            self._constants.append((name, hint))
        elif not has_default:
            raise self._fault(name, f"has type {_named(hint)}, which is neither {self._known()}")

    def _take_model(self, name: str, model: type[BaseModel]) -> None:
        if self._model is not None:
            raise self._fault(name, "is a second message; a handler takes one")
        self._model = model
        self._slots.append((name, _MODEL))

    def _take_session(self, name: str, hint: type) -> None:
        is_async = inspect.iscoroutinefunction(self._function)
        if is_async is not (hint is AsyncSession):
            given, kind, wanted, other = _PLAIN_SESSION if is_async else _ASYNC_SESSION
            raise self._fault(name, f"is {given}, but the handler is {kind}: take {wanted}, or make it {other}")
        self._need(name, "transaction", "the session of the effect's transaction")

    def _need(self, name: str, effects: Effects, what: str) -> None:
        if self._effects != effects:
            raise self._fault(name, f'is {what}, which only effects="{effects}" has, not "{self._effects}"')
        self._slots.append((name, _RESOURCE))

    def _known(self) -> str:
        models = ", ".join(model.__name__ for model in self._topic.models)
        extra = "".join(f", {kind.__name__}" for kind in self._provided)
        known = f"the topic's model ({models}), Delivery, AsyncSession, Session, FencingToken"
        return f"{known} nor provided (app.provide{extra})"

    def _fault(self, parameter: str | None, fault: str) -> HandlerSignatureError:
        return HandlerSignatureError(self._label, parameter, fault)


def _named(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
