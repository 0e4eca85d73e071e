"""Topics: what ties a name on a broker to pydantic models, a key and a durability; model to message and back.

A topic is a plain value.  It is made free, at import, and bound to an application later, so that modules which share
topics need not share the application.  What could never be sent is refused here, before anything was stored anywhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, Protocol, TypeVar

import uuid_utils
from pydantic import BaseModel, TypeAdapter, ValidationError

from reliamq.spi import (
    ConfigurationError,
    Confirmation,
    Durability,
    GroupSpec,
    InvalidMessage,
    Message,
    TooLarge,
    TopicSpec,
    Undecodable,
)
from reliamq.spi.messages import NO_HEADERS

__all__ = ["DEFAULT_DEADLINE", "DEFAULT_MAX_MESSAGE_BYTES", "DEFAULT_RETENTION", "Topic", "new_message_id", "type_name"]

M = TypeVar("M", bound=BaseModel)
DEFAULT_DEADLINE = timedelta(seconds=30)
DEFAULT_MAX_MESSAGE_BYTES = 1_048_576
DEFAULT_RETENTION = timedelta(days=7)


def new_message_id() -> str:
    """A UUIDv7 as text: unique, and sorted by time, which keeps indexes on it compact (RFC 9562, section 5.7)."""
    return str(uuid_utils.uuid7())


def type_name(model: type[BaseModel]) -> str:
    """The name that a model's messages carry: its ``__message_type__`` where it sets one, its class name otherwise."""
    return getattr(model, "__message_type__", model.__name__)


class PublishCall(Protocol):
    """What an application gives a topic to publish with."""

    def __call__(self, message: Message, *, deadline: timedelta) -> Awaitable[Confirmation]: ...


@dataclass(frozen=True, slots=True)
class _Kind:
    """One model of a topic with its compiled encoder and decoder."""

    name: str
    adapter: TypeAdapter[BaseModel]


class Topic(Generic[M]):
    """A named stream of one or more kinds of model.

    name: on the broker.
    models: one, or several kinds of message that share the topic and its order.
    key: what orders a message among others, from the model; text, bytes, or None for "no order".
    groups: subscribers that must exist before anybody publishes, besides those that handlers name.
    durability: what a confirmation must have survived; None: what the application requires.
    retention: how long a finished message is kept for groups yet to come.
    max_message_bytes: larger messages are rejected before they are sent (P6).
    source: CloudEvents ``source``, a URI-reference naming the publisher.
    """

    def __init__(
        self,
        name: str,
        *models: type[M],
        key: Callable[[M], str | bytes | None] | None = None,
        groups: Sequence[str | GroupSpec] = (),
        durability: Durability | None = None,
        retention: timedelta = DEFAULT_RETENTION,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        source: str = "reliamq",
    ) -> None:
        if not name or not name.isprintable() or "/" in name or " " in name:
            raise ConfigurationError(f"topic name {name!r} must be printable text without spaces and slashes")
        if not models:
            raise ConfigurationError(f"topic '{name}' needs at least one pydantic model")
        self.name, self.models, self.key, self.source = name, models, key, source
        self.groups = tuple(group if isinstance(group, GroupSpec) else GroupSpec(group) for group in groups)
        self.durability, self.retention, self.max_message_bytes = durability, retention, max_message_bytes
        self._by_model: dict[type[BaseModel], _Kind] = {}
        self._by_name: dict[str, _Kind] = {}
        for model in models:
            self._register(model)
        self._publish: PublishCall | None = None

    def __repr__(self) -> str:
        return f"<Topic '{self.name}' of {', '.join(self._by_name)}>"

    def _register(self, model: type[M]) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise ConfigurationError(f"topic '{self.name}': {model!r} is not a pydantic model class")
        kind = _Kind(type_name(model), TypeAdapter(model))
        if kind.name in self._by_name:
            raise ConfigurationError(f"topic '{self.name}' has two models named '{kind.name}'; set __message_type__")
        self._by_model[model] = self._by_name[kind.name] = kind

    # --- model to message ------------------------------------------------------------------------------------------

    def message(
        self,
        model: M,
        *,
        id: str | None = None,  # the field's name in CloudEvents
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> Message:
        """Encode ``model`` as a message for this topic.

        Raises InvalidMessage (not one of the topic's models, key neither text nor bytes, header not text) and TooLarge.
        """
        message_id = id or new_message_id()
        kind = self._by_model.get(type(model))
        if kind is None:
            raise InvalidMessage(self.name, message_id, f"{type(model).__name__} is not one of {list(self._by_name)}")
        try:
            body = kind.adapter.dump_json(model)
        except ValueError as error:  # PydanticSerializationError is one
            raise InvalidMessage(self.name, message_id, f"{kind.name} cannot be written as JSON: {error}") from error
        return self._checked(
            Message(
                topic=self.name,
                body=body,
                id=message_id,
                type=kind.name,
                source=self.source,
                time=datetime.now(UTC),
                key=self._key_of(model, message_id),
                headers=self._text_headers(headers, message_id) if headers else NO_HEADERS,
            )
        )

    def _key_of(self, model: M, message_id: str) -> bytes | None:
        key = self.key(model) if self.key is not None else None
        if key is None or isinstance(key, bytes):
            return key
        if isinstance(key, str):
            return key.encode()
        raise InvalidMessage(self.name, message_id, f"key must be text or bytes, not {type(key).__name__}: {key!r}")

    def _text_headers(self, headers: Mapping[str, str], message_id: str) -> Mapping[str, str]:
        for name, value in headers.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise InvalidMessage(self.name, message_id, f"header {name!r} must be text, not {type(value).__name__}")
        return dict(headers)

    def _checked(self, message: Message) -> Message:
        if message.size > self.max_message_bytes:
            raise TooLarge(
                self.name, message.id, f"{message.size} bytes are over the topic's limit of {self.max_message_bytes}"
            )
        return message

    # --- message to model ------------------------------------------------------------------------------------------

    def knows(self, message_type: str) -> bool:
        """Whether the topic has a model of that name."""
        return message_type in self._by_name

    def decode(self, message: Message) -> M:
        """Validate a body against the model that the message's type names.  Raises Undecodable (C11)."""
        kind = self._by_name.get(message.type)
        if kind is None:
            raise Undecodable("", message.id, f"type '{message.type}' is none of {list(self._by_name)}")
        try:
            return kind.adapter.validate_json(message.body)  # type: ignore[return-value]  # the kind's model is an M
        except ValidationError as error:
            raise Undecodable("", message.id, f"body is no valid {kind.name}: {_first_fault(error)}") from error

    def parse(self, body: bytes, message_type: str | None = None) -> M:
        """Validate a body that came from outside, such as a line of a file.

        message_type may be left out where the topic has one model.  Raises ValueError naming the field that is wrong.
        """
        if message_type is None and len(self._by_name) > 1:
            raise ValueError(f"topic '{self.name}' has several types, name one of {list(self._by_name)}")
        kind = self._by_name.get(message_type or next(iter(self._by_name)))
        if kind is None:
            raise ValueError(f"type '{message_type}' is none of {list(self._by_name)}")
        try:
            return kind.adapter.validate_json(body)  # type: ignore[return-value]  # as above
        except ValidationError as error:
            raise ValueError(_first_fault(error)) from error

    # --- as the application sees it --------------------------------------------------------------------------------

    def spec(self, *, durability: Durability, groups: Sequence[GroupSpec] = ()) -> TopicSpec:
        """What the broker has to have for it: its own groups and the given ones.  ``durability`` counts where it names
        none.
        """
        wanted = {group.name: group for group in (*groups, *self.groups)}
        return TopicSpec(
            name=self.name,
            groups=tuple(wanted[name] for name in sorted(wanted)),
            durability=durability if self.durability is None else self.durability,
            retention=self.retention,
            max_message_bytes=self.max_message_bytes,
            keyed=self.key is not None,
        )

    def bind(self, publish: PublishCall) -> None:
        """Let :meth:`publish` go through an application.  ConfigurationError if another one has it."""
        if self._publish is not None and self._publish != publish:
            raise ConfigurationError(f"topic '{self.name}' belongs to another application already")
        self._publish = publish

    async def publish(
        self,
        model: M,
        *,
        id: str | None = None,  # the field's name in CloudEvents
        headers: Mapping[str, str] = NO_HEADERS,
        deadline: timedelta = DEFAULT_DEADLINE,
    ) -> Confirmation:
        """Publish and return when the message is stored to the topic's durability (P1).

        id: give the same one again when repeating after Unconfirmed (P4).
        deadline: how long to wait for the confirmation.
        Raises Rejected (certainly not stored) or Unconfirmed (may be stored).
        Cancelled: the message may be stored; its id, if you gave it, tells later.
        """
        if self._publish is None:
            raise ConfigurationError(
                f"topic '{self.name}' is not bound to an application; use app.topic or app.include"
            )
        return await self._publish(self.message(model, id=id, headers=headers), deadline=deadline)


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    field = ".".join(str(part) for part in first["loc"]) or "(whole body)"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"field '{field}': {first['msg']}{more}"
