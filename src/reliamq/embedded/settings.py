"""What may be set for the embedded broker, and how its URLs are read.

It promises that every wrong part of a URL or of the settings is named.  Nothing is opened here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reliamq.spi import ConfigurationError

__all__ = ["EmbeddedSettings", "Location", "locate"]


class EmbeddedSettings(BaseModel):
    """Settings of the embedded broker, from its section of the configuration or the URL's query.

    max_bytes: the file is not let grow over this; more is rejected as full.  None: the disk is the limit.
    patience_seconds: how long any operation waits for another process that holds the file, then fails.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes: int | None = Field(default=None, ge=1_000_000)
    patience_seconds: float = Field(default=30.0, gt=0, le=3600)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a broker is.

    url: as given, without the query.
    path: absolute path of the file, or None: in memory.
    name: which one of the process's brokers in memory.
    """

    url: str
    path: str | None
    name: str
    settings: EmbeddedSettings

    def is_missing(self) -> bool:
        """Whether its file is not there; opening makes it."""
        return self.path is not None and not os.path.exists(self.path)


def locate(url: str, settings: Mapping[str, object]) -> Location:
    """Read a URL.

    ``embedded:///orders.db`` is relative to the working directory, ``embedded:////var/lib/orders.db`` absolute, as
    SQLAlchemy has it; ``memory://`` and ``memory://name`` are brokers inside this process.
    Raises ConfigurationError naming the part of the URL or the field that is wrong.
    """
    parts = urlsplit(url)
    checked = _settings(url, {**settings, **dict(parse_qsl(parts.query, keep_blank_values=True))})
    plain = url.partition("?")[0]
    if parts.scheme == "memory":
        if parts.path not in ("", "/"):
            raise ConfigurationError(f"{plain}: a broker in memory has a name and no path; write memory://name")
        return Location(plain, None, parts.netloc, checked)
    if parts.netloc:
        raise ConfigurationError(
            f"{plain}: '{parts.netloc}' stands where a host would; write embedded:///{parts.netloc}{parts.path} "
            "for a relative path, embedded:////folder/file.db for an absolute one"
        )
    path = unquote(parts.path[1:])
    if not path or path.endswith("/"):
        raise ConfigurationError(f"{plain}: names no file; write embedded:///file.db")
    return Location(plain, os.path.realpath(path), "", checked)


def _settings(url: str, values: Mapping[str, object]) -> EmbeddedSettings:
    try:
        return EmbeddedSettings.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(str(part) for part in f['loc'])}: {f['msg']}" for f in error.errors())
        raise ConfigurationError(f"{url.partition('?')[0]}: embedded broker settings: {faults}") from error
