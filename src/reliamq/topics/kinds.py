"""One kind of message: a pydantic model, written as JSON and read back.

What a kind writes, it can read: a model that was changed or made past its validation is found when it is written, and
a model whose own JSON it would not accept is refused when its topic is made.
"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any, get_args
from uuid import UUID

from pydantic import AliasChoices, BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError

from reliamq.spi import ConfigurationError
from reliamq.spi.arguments import need

__all__ = ["Kind", "type_name"]

TYPE_CHARACTERS = 255  # the outbox column's width
# Of these, the type alone says whether a value is what its field declares; in others something else may be wrong.
PLAIN_TYPES = frozenset({NoneType, bool, int, float, str, bytes, Decimal, UUID, date, datetime, time, timedelta})
MOST_COMBINATIONS = 1000


def type_name(model: type[BaseModel]) -> str:
    """The name that a model's messages carry: its ``__message_type__`` where it sets one, its class name otherwise."""
    return getattr(model, "__message_type__", model.__name__)


class Kind:
    """A model with its compiled encoder and decoder.

    name: what its messages carry as their type.
    """

    __slots__ = ("_adapter", "_by_alias", "_fields", "_never_none", "_sound", "name")

    def __init__(self, model: type[BaseModel]) -> None:
        self.name = type_name(model)
        printable = isinstance(self.name, str) and self.name.isprintable() and 0 < len(self.name) <= TYPE_CHARACTERS
        wanted = f"1 to {TYPE_CHARACTERS} printable characters"
        need(printable, f"{model.__name__}: __message_type__", wanted, self.name)
        self._by_alias = _reads_by_alias(model)
        self._adapter: TypeAdapter[BaseModel] = TypeAdapter(model)
        self._fields = frozenset(model.model_fields)
        self._never_none = tuple(name for name, field in model.model_fields.items() if not _may_be_none(field))
        self._sound: set[tuple[type, ...]] = set()

    def write(self, model: BaseModel) -> bytes:
        """The model as JSON that :meth:`read` accepts.  Raises ValueError saying what is wrong.

        A model that pydantic made is not validated a second time.  One that lacks a field or holds a value of another
        type than declared was made by ``model_construct`` or changed; only that one is read back, at once.  Not seen
        are a value of the right type that breaks a rule of its field (``gt=0``, ``Literal``) and None inside of a
        field's value; they become dead letters: use ``validate_assignment`` where models are changed.
        """
        types = tuple(map(type, model.__dict__.values()))
        # Straight to the serializer: the adapter's own dump_json costs as much again for its keyword arguments, and so
        # does warnings="error", which models of plain values therefore need only once.
        if types in self._sound:
            return self._adapter.serializer.to_json(model, by_alias=self._by_alias, warnings=False)
        body = self._write_as_declared(model, types)
        if body is None:
            body = self._adapter.dump_json(model, by_alias=self._by_alias, warnings="none")
            self.read(body)
        return body

    def _write_as_declared(self, model: BaseModel, types: tuple[type, ...]) -> bytes | None:
        """None for a model with a field that is missing, None, or of another type than it is declared."""
        values = model.__dict__
        if not self._fields <= values.keys():
            return None
        try:
            body = self._adapter.serializer.to_json(model, by_alias=self._by_alias, warnings="error")
        except PydanticSerializationError:
            return None
        # pydantic writes None for a field of any type without a word.
        if b"null" in body and any(values[name] is None for name in self._never_none):
            return None
        self._remember(types)
        return body

    def _remember(self, types: tuple[type, ...]) -> None:
        """A model whose fields hold values of these types is as declared."""
        if len(self._sound) < MOST_COMBINATIONS and PLAIN_TYPES.issuperset(types):
            self._sound.add(types)

    def read(self, body: bytes) -> BaseModel:
        """The model that a body holds.  Raises ValueError naming the first field that is wrong."""
        try:
            return self._adapter.validate_json(body)
        except ValidationError as error:
            raise ValueError(_first_fault(error)) from error


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False, include_input=False)
    first = faults[0]
    field = ".".join(str(part) for part in first["loc"]) or "(whole body)"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"field '{field}': {first['msg']}{more}"


def _may_be_none(field: FieldInfo) -> bool:
    return field.annotation in (Any, object, None, NoneType) or NoneType in get_args(field.annotation)


# --- aliases ----------------------------------------------------------------------------------------------------------


def _reads_by_alias(model: type[BaseModel]) -> bool | None:
    """How to write field names so that the model reads them: None as its own configuration has it, True by alias."""
    for by_alias in (None, True):
        if not _unreadable(model, by_alias):
            return by_alias
    raise ConfigurationError(
        f"{model.__name__}: its field '{_unreadable(model, None)}' is read under another name than it is written "
        "under; give it one alias for both, or set populate_by_name"
    )


def _unreadable(model: type[BaseModel], by_alias: bool | None) -> str | None:
    """The first field that the model would not read from what it wrote."""
    written_by_alias = bool(model.model_config.get("serialize_by_alias")) if by_alias is None else by_alias
    for name, field in model.model_fields.items():
        written = (field.serialization_alias or name) if written_by_alias else name
        if field.is_required() and written not in _accepted(model, name, field):
            return name
    return None


def _accepted(model: type[BaseModel], name: str, field: FieldInfo) -> set[str]:
    """The names under which the model reads a field."""
    by_name = model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name")
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    found = {one for one in choices if isinstance(one, str)}
    return found | {name} if by_name or alias is None else found
