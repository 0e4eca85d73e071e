"""Variables of the environment and of ``.env``: which are ours, and which only look so.

A name that begins with ``RELIAMQ_`` and means nothing is refused, because it is a misspelt setting that would be
missed.  What other programs keep there is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from reliamq.spi import WORKER_NUMBER, ConfigurationError

__all__ = ["DELIMITER", "PREFIX", "OurVariables", "nearest", "variable"]

PREFIX, DELIMITER = "RELIAMQ_", "__"
NO_SETTINGS = {"RELIAMQ_TRACEBACK", WORKER_NUMBER}  # the commands'
# Kubernetes and Docker describe a service that is itself called reliamq in variables of these forms.
_OF_A_SERVICE = re.compile(r"RELIAMQ_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP)\w*)?)")


class OurVariables(PydanticBaseSettingsSource):
    """The variables that are settings.  where: how people call the place."""

    def __init__(self, settings: type[BaseSettings], source: PydanticBaseSettingsSource, where: str) -> None:
        super().__init__(settings)
        self._source, self._where = source, where

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        if isinstance(self._source, EnvSettingsSource):
            self._check(self._source.env_vars)
        return {name: value for name, value in self._source().items() if name in self.settings_cls.model_fields}

    def _check(self, variables: Mapping[str, str | None]) -> None:
        sections = _sections(self.settings_cls)
        known = {variable(name) for name in self.settings_cls.model_fields}.union(NO_SETTINGS, *sections.values())
        for name, value in variables.items():
            name = name.upper()
            if (
                not name.startswith(PREFIX)
                or name.startswith(variable("backends", ""))
                or _OF_A_SERVICE.fullmatch(name)
            ):
                continue
            if name not in known:
                raise ConfigurationError(f"{name} in {self._where} is no setting{nearest(name, known)}")
            if name in sections and not _is_object(value or ""):
                example = f"set its fields one by one, such as {sections[name][0]}"
                raise ConfigurationError(f"{name} in {self._where} is a section; {example}")


def variable(*path: str) -> str:
    """The variable that sets a field."""
    return PREFIX + DELIMITER.join(path).upper()


def nearest(name: str, known: Collection[str]) -> str:
    """What was probably meant, or everything that could have been, as the end of a sentence."""
    ends = {one.removeprefix(PREFIX): one for one in known}  # the prefix would make everything look near
    close = get_close_matches(name.removeprefix(PREFIX), sorted(ends), n=1, cutoff=0.75)
    return f"; did you mean {ends[close[0]]}?" if close else f"; there are {', '.join(sorted(known))}"


def _sections(settings: type[BaseSettings]) -> dict[str, list[str]]:
    """The variables of sections, each with those of its fields."""
    found = {variable("backends"): [variable("backends", "embedded", "max_bytes")]}
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[variable(name)] = [variable(name, inner) for inner in field.annotation.model_fields]
    return found


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
