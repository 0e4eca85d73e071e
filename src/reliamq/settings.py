"""Settings: what differs between a laptop and production, and nothing that belongs in code.

Read from, highest first: arguments, environment (``RELIAMQ_BROKER``, ``RELIAMQ_WORKER__LEASE``), ``.env``,
``reliamq.toml``, the table ``[tool.reliamq]`` of ``pyproject.toml``.  A wrong value names its field and where it came
from; secrets are masked wherever they are shown.
"""

from __future__ import annotations

import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    PyprojectTomlConfigSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from reliamq.spi import ConfigurationError, Durability

__all__ = ["PublisherSettings", "RelaySettings", "Settings", "WorkerSettings", "load_settings", "masked"]

SETTINGS_FILE = Path("reliamq.toml")
# Rather too much than too little: a password with an unquoted slash or at sign is hidden as well.
_PASSWORD = re.compile(r"(?P<user>://[^/?#:@]*):[^?#]*@")
_SECRET_PARAMETER = re.compile(r"(?P<name>[?&][^=&#]*(?:password|secret|token|key)[^=&#]*=)[^&#]*", re.IGNORECASE)


def masked(url: str) -> str:
    """The URL with its password and secret-looking parameters hidden, fit for logs and errors."""
    return _SECRET_PARAMETER.sub(r"\g<name>***", _PASSWORD.sub(r"\g<user>:***@", url))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkerSettings(_Section):
    """Consuming.

    lease: how long a delivery stays a worker's without renewal; what a crashed worker held is redelivered after it.
    prefetch, prefetch_bytes: most that one group's member holds unsettled (C10).
    stop_deadline: how long handlers may finish when the worker stops (C8).
    processed_window: how long processed ids are kept (I5).
    replay_horizon: how old a dead letter may be when it is replayed; the window must cover it and the longest retry.
    """

    lease: timedelta = Field(default=timedelta(seconds=30), gt=timedelta(0))
    prefetch: int = Field(default=500, ge=1)
    prefetch_bytes: int = Field(default=16 * 1024 * 1024, ge=1)
    stop_deadline: timedelta = Field(default=timedelta(seconds=30), ge=timedelta(0))
    processed_window: timedelta = Field(default=timedelta(days=14), gt=timedelta(0))
    replay_horizon: timedelta = Field(default=timedelta(days=7), ge=timedelta(0))


class PublisherSettings(_Section):
    """Publishing.

    batch: most messages sent at once.  in_flight, in_flight_bytes: most that wait for an outcome (P6).
    close_deadline: how long closing waits for outstanding confirms (P7).
    """

    batch: int = Field(default=512, ge=1)
    in_flight: int = Field(default=10_000, ge=1)
    in_flight_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    close_deadline: timedelta = Field(default=timedelta(seconds=30), ge=timedelta(0))


class RelaySettings(_Section):
    """The outbox relay.

    batch: rows claimed at once.  poll: pause when nothing waits.  lease: after which a dead relay's rows are free.
    attempts: rejections of one row before it is parked (O5).  deadline: for the confirms of one batch.
    """

    batch: int = Field(default=500, ge=1)
    poll: timedelta = Field(default=timedelta(milliseconds=100), gt=timedelta(0))
    lease: timedelta = Field(default=timedelta(seconds=15), gt=timedelta(0))
    attempts: int = Field(default=10, ge=1)
    deadline: timedelta = Field(default=timedelta(seconds=30), gt=timedelta(0))


class Settings(BaseSettings):
    """All settings of an application.

    broker: URL of the broker.  database: SQLAlchemy URL, where outbox or ``effects="transaction"`` are used.
    durability: what the broker must offer before the application starts; None: replicated on networked brokers, else
    the
        backend's best.
    source: CloudEvents source of what is published.
    backends: a section for each backend, checked by the backend.
    """

    model_config = SettingsConfigDict(
        env_prefix="RELIAMQ_",
        env_nested_delimiter="__",
        env_file=".env",
        toml_file=SETTINGS_FILE,
        pyproject_toml_table_header=("tool", "reliamq"),
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    broker: str = Field(default="embedded:///reliamq.db", repr=False)
    database: str | None = Field(default=None, repr=False)
    durability: Durability | None = None
    source: str = "reliamq"
    worker: WorkerSettings = WorkerSettings()
    publisher: PublisherSettings = PublisherSettings()
    relay: RelaySettings = RelaySettings()
    backends: dict[str, dict[str, Any]] = Field(default_factory=dict, repr=False)

    @field_validator("durability", mode="before")
    @classmethod
    def _durability_by_name(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                return Durability[value.upper()]
            except KeyError:
                names = ", ".join(one.name.lower() for one in Durability)
                raise ValueError(f"'{value}' is none of {names}") from None
        return value

    @field_validator("broker")
    @classmethod
    def _broker_is_a_url(cls, value: str) -> str:
        if "://" not in value:
            raise ValueError("is no URL; write something like embedded:///app.db or kafka://host:9092")
        return value

    def __repr_args__(self) -> Any:
        yield "broker", masked(self.broker)
        yield "database", None if self.database is None else masked(self.database)
        yield from super().__repr_args__()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of the sources, highest first."""
        return (
            init_settings,
            env_settings,
            _OnlyOurs(settings_cls, dotenv_settings),
            TomlConfigSettingsSource(settings_cls),
            PyprojectTomlConfigSettingsSource(settings_cls),
        )


class _OnlyOurs(PydanticBaseSettingsSource):
    """The ``.env`` file holds other programs' variables too; they are not our unknown fields."""

    def __init__(self, settings_cls: type[BaseSettings], source: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        self._source = source

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in self._source().items() if name in self.settings_cls.model_fields}


def load_settings(**arguments: object) -> Settings:
    """Read the settings.  Raises ConfigurationError naming the field, the fault and the sources that were looked at."""
    try:
        return Settings(**cast("dict[str, Any]", arguments))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{_broken_file()}: not valid TOML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(_fault(one) for one in error.errors(include_url=False, include_input=False))
        sources = f"arguments, RELIAMQ_* in the environment, .env, {SETTINGS_FILE}, pyproject.toml [tool.reliamq]"
        raise ConfigurationError(f"settings are wrong: {faults} (looked at: {sources})") from error
    except ValueError as error:  # pydantic-settings: an environment value that is not the JSON a field needs
        raise ConfigurationError(f"settings are wrong: {error}") from error


def _fault(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    return f"field '{field}': {error['msg']}"


def _broken_file() -> Path:
    for path in (SETTINGS_FILE, Path("pyproject.toml")):
        if path.exists():
            try:
                tomllib.loads(path.read_text(encoding="utf-8"))
            except tomllib.TOMLDecodeError:
                return path
    return SETTINGS_FILE
