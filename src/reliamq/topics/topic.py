"""The topic: its name, its kinds of message, its key, and publishing through the application that it is bound to."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar

import uuid_utils
from pydantic import BaseModel

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
from reliamq.spi.arguments import check_name, check_time, check_whole_number, need, shown
from reliamq.spi.messages import NO_HEADERS
from reliamq.topics.kinds import Kind

__all__ = ["DEFAULT_DEADLINE", "DEFAULT_MAX_MESSAGE_BYTES", "DEFAULT_RETENTION", "Topic", "new_message_id"]

M = TypeVar("M", bound=BaseModel)
DEFAULT_DEADLINE = timedelta(seconds=30)
DEFAULT_MAX_MESSAGE_BYTES = 1_048_576
DEFAULT_RETENTION = timedelta(days=7)
MAX_ID_CHARACTERS = 200  # what the outbox and the tables of processed ids hold
MAX_SOURCE_CHARACTERS = 255  # the outbox column's width


def new_message_id() -> str:
    """A UUIDv7 as text: unique, and sorted by time, which keeps indexes on it compact (RFC 9562, section 5.7)."""
    return str(uuid_utils.uuid7())


class PublishCall(Protocol):
    """What an application gives a topic to publish with."""

    def __call__(self, message: Message, *, deadline: timedelta) -> Awaitable[Confirmation]: ...


class Topic(Generic[M]):
    """A named stream of one or more kinds of model.

    name: on the broker.
    models: one, or several kinds of message that share the topic and its order.
    key: what orders a message among others, from the model; text, bytes, or None for "no order".
    groups: subscribers that must exist before anybody publishes, besides those that handlers name.
    durability: what a confirmation must have survived, as a member or its name; None: what the application requires.
    retention: how long a finished message is kept for groups yet to come.
    max_message_bytes: larger messages are rejected before they are sent (P6).
    source: CloudEvents ``source``, a URI-reference naming the publisher.
    Raises ConfigurationError naming the parameter that is wrong.
    """

    def __init__(
        self,
        name: str,
        *models: type[M],
        key: Callable[[M], str | bytes | None] | None = None,
        groups: Sequence[str | GroupSpec] = (),
        durability: Durability | str | None = None,
        retention: timedelta = DEFAULT_RETENTION,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        source: str = "reliamq",
    ) -> None:
        check_name("topic name", name)
        self.name, self.models, self.source = name, models, source
        self.key = self._checked_key(key)
        self.groups = self._checked_groups(groups)
        self.durability = None if durability is None else Durability.named(f"topic '{name}': durability", durability)
        self.retention, self.max_message_bytes = retention, max_message_bytes
        self._check_limits()
        self._by_model: dict[type[BaseModel], Kind] = {}
        self._by_name: dict[str, Kind] = {}
        for model in self._checked_models():
            self._register(model)
        self._publish: PublishCall | None = None

    def __repr__(self) -> str:
        return f"<Topic '{self.name}' of {', '.join(self._by_name)}>"

    # --- as it was declared ----------------------------------------------------------------------------------------

    def _checked_key(self, key: Any) -> Callable[[M], str | bytes | None] | None:
        fine = key is None or (callable(key) and not inspect.iscoroutinefunction(key))
        need(fine, f"topic '{self.name}': key", "a plain function of the model, such as lambda one: one.account", key)
        return key  # type: ignore[no-any-return]  # a function's own signature shows when it is called

    def _checked_groups(self, groups: Any) -> tuple[GroupSpec, ...]:
        what = f"topic '{self.name}': groups"
        listed = isinstance(groups, Sequence | set | frozenset) and not isinstance(groups, str | bytes)
        need(listed, what, f"a list of names, such as [{groups!r}]" if isinstance(groups, str) else "a list", groups)
        found = tuple(group if isinstance(group, GroupSpec) else self._group(group) for group in groups)
        names = [group.name for group in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        need(not twice, what, "named once each", groups)
        return found

    def _group(self, name: Any) -> GroupSpec:
        check_name(f"topic '{self.name}': group name", name)
        return GroupSpec(name)

    def _check_limits(self) -> None:
        check_time(f"topic '{self.name}': retention", self.retention, may_be_zero=True)
        check_whole_number(f"topic '{self.name}': max_message_bytes", self.max_message_bytes, least=1)
        fine = isinstance(self.source, str) and self.source.isprintable() and len(self.source) <= MAX_SOURCE_CHARACTERS
        wanted = f"1 to {MAX_SOURCE_CHARACTERS} printable characters"
        need(fine and self.source != "", f"topic '{self.name}': source", wanted, self.source)

    def _checked_models(self) -> tuple[type[M], ...]:
        if not self.models:
            raise ConfigurationError(f"topic '{self.name}' needs at least one pydantic model")
        for model in self.models:
            if not (isinstance(model, type) and issubclass(model, BaseModel)):
                raise ConfigurationError(f"topic '{self.name}': {shown(model)} is not a pydantic model class")
        return self.models

    def _register(self, model: type[M]) -> None:
        kind = Kind(model)
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

        id: 1 to 200 printable characters; None makes one.
        Raises TooLarge and InvalidMessage: not one of the topic's models, or one that the topic could not decode
        (:meth:`reliamq.topics.kinds.Kind.write` says how far that is looked at); a key that is neither text nor bytes
        or a key function that fails; a wrong id; a header that is not text.
        """
        message_id = new_message_id() if id is None else self._checked_id(id)
        kind = self._by_model.get(type(model))
        if kind is None:
            raise InvalidMessage(self.name, message_id, f"{type(model).__name__} is not one of {list(self._by_name)}")
        try:
            body = kind.write(model)
        except ValueError as error:  # pydantic's serialization errors are such
            raise InvalidMessage(self.name, message_id, f"it is no valid {kind.name}: {error}") from error
        key = self._key_of(model, message_id)
        message = Message(self.name, body, message_id, kind.name, self.source, datetime.now(UTC), key)
        if headers:
            message = replace(message, headers=self._text_headers(headers, message_id))
        return self._checked(message)

    def _checked_id(self, id: Any) -> str:
        if isinstance(id, str) and 0 < len(id) <= MAX_ID_CHARACTERS and id.isprintable():
            return id
        wanted = f"its id must be 1 to {MAX_ID_CHARACTERS} printable characters"
        raise InvalidMessage(self.name, shown(id), f"{wanted}, not {shown(id)}")

    def _key_of(self, model: M, message_id: str) -> bytes | None:
        if self.key is None:
            return None
        try:
            key: Any = self.key(model)
            if key is None or isinstance(key, bytes):
                return key
            if isinstance(key, str):
                return key.encode()
        except UnicodeEncodeError as error:
            raise InvalidMessage(self.name, message_id, f"key is no text that UTF-8 can hold: {error}") from error
        except Exception as error:  # the user's function
            fault = f"the topic's key function failed: {type(error).__name__}: {error}"
            raise InvalidMessage(self.name, message_id, fault) from error
        raise InvalidMessage(self.name, message_id, f"key must be text or bytes, not {shown(key)}")

    def _text_headers(self, headers: Any, message_id: str) -> Mapping[str, str]:
        if not isinstance(headers, Mapping):
            raise InvalidMessage(self.name, message_id, f"headers must be a mapping, not {shown(headers)}")
        for name, value in headers.items():
            for one in (name, value):
                if not isinstance(one, str) or not _is_unicode(one):
                    raise InvalidMessage(self.name, message_id, f"header {name!r} must be text, not {shown(one)}")
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
            return kind.read(message.body)  # type: ignore[return-value]  # the kind's model is an M
        except ValueError as error:
            raise Undecodable("", message.id, f"body is no valid {kind.name}: {error}") from error

    def parse(self, body: bytes, message_type: str | None = None) -> M:
        """Validate a body that came from outside, such as a line of a file.

        message_type may be left out where the topic has one model.  Raises ValueError naming the field that is wrong.
        """
        if message_type is None and len(self._by_name) > 1:
            raise ValueError(f"topic '{self.name}' has several types, name one of {list(self._by_name)}")
        kind = self._by_name.get(message_type or next(iter(self._by_name)))
        if kind is None:
            raise ValueError(f"type '{message_type}' is none of {list(self._by_name)}")
        return kind.read(body)  # type: ignore[return-value]  # as above

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


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: a lone surrogate cannot be sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
