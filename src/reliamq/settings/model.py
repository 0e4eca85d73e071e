"""The settings themselves: every field with its default, its bounds and what it is for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    PyprojectTomlConfigSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from reliamq.settings.durations import Duration
from reliamq.settings.faults import ENV_FILE, ENVIRONMENT, PYPROJECT, SETTINGS_FILE, clear_faults
from reliamq.settings.masking import masked
from reliamq.settings.sources import DELIMITER, PREFIX, OurVariables
from reliamq.spi import CLAIM_BYTES, ConfigurationError, Durability

__all__ = ["OutboxSettings", "PublisherSettings", "RelaySettings", "Settings", "WorkerSettings", "load_settings"]

# Longer ones are slips of the pen, such as milliseconds that were meant.
DAY, YEARS = timedelta(days=1), timedelta(days=3650)
SHORTEST_LEASE = timedelta(milliseconds=100)
MOST = 1_000_000
MOST_BYTES = 1 << 40


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    if not TYPE_CHECKING:  # what type checkers make of the fields is better

        def __init__(self, **values):
            with clear_faults(type(self), lambda: [("code", values)]):
                super().__init__(**values)


class WorkerSettings(_Section):
    """Consuming.

    lease: how long a delivery stays a worker's without renewal; what a crashed worker held is redelivered after it.
    prefetch, prefetch_bytes: most that one group's member holds unsettled (C10).
    stop_deadline: how long handlers may finish when the worker stops (C8).
    processed_window: how long processed ids are kept (I5).
    replay_horizon: how old a dead letter may be when it is replayed; the window must cover it and the longest retry.
    """

    lease: Duration = Field(default=timedelta(seconds=30), ge=SHORTEST_LEASE, le=DAY)
    prefetch: int = Field(default=500, ge=1, le=MOST)
    prefetch_bytes: int = Field(default=16 * 1024 * 1024, ge=1, le=MOST_BYTES)
    stop_deadline: Duration = Field(default=timedelta(seconds=30), ge=timedelta(0), le=DAY)
    processed_window: Duration = Field(default=timedelta(days=14), gt=timedelta(0), le=YEARS)
    replay_horizon: Duration = Field(default=timedelta(days=7), ge=timedelta(0), le=YEARS)


class PublisherSettings(_Section):
    """Publishing.

    batch: most messages sent at once.  in_flight, in_flight_bytes: most that wait for an outcome (P6).
    close_deadline: how long closing waits for outstanding confirms (P7).
    """

    batch: int = Field(default=512, ge=1, le=MOST)
    in_flight: int = Field(default=10_000, ge=1, le=MOST)
    in_flight_bytes: int = Field(default=64 * 1024 * 1024, ge=1, le=MOST_BYTES)
    close_deadline: Duration = Field(default=timedelta(seconds=30), ge=timedelta(0), le=DAY)


class RelaySettings(_Section):
    """The outbox relay.

    batch, batch_bytes: rows claimed at once; the one whose body reaches so many bytes is the last.
    poll: pause when nothing waits.  lease: after which a dead relay's rows are free.
    attempts: rejections of one row before it is parked (O5).  deadline: for the confirms of one batch.
    listen: be told of new rows by PostgreSQL, besides polling; see ``outbox.create_notify_trigger``.
    """

    batch: int = Field(default=2000, ge=1, le=MOST)
    batch_bytes: int = Field(default=CLAIM_BYTES, ge=1, le=MOST_BYTES)
    poll: Duration = Field(default=timedelta(milliseconds=50), gt=timedelta(0), le=DAY)
    listen: bool = False
    lease: Duration = Field(default=timedelta(seconds=15), ge=SHORTEST_LEASE, le=DAY)
    attempts: int = Field(default=10, ge=1, le=MOST)
    deadline: Duration = Field(default=timedelta(seconds=30), gt=timedelta(0), le=DAY)


class OutboxSettings(_Section):
    """The outbox table.

    keep: how long sent rows are kept, to be sent again when a broker has lost data (O7); 0: they are deleted.
    """

    keep: Duration = Field(default=timedelta(0), ge=timedelta(0), le=YEARS)


class Settings(BaseSettings):
    """All settings of an application, read from the environment and files; what is given here wins over them.

    broker: URL of the broker.  database: SQLAlchemy URL, where outbox or ``effects="transaction"`` are used.
    leases: URL of where ``effects="lease"`` and locks are kept (a Redis); None: in the database.
    durability: what the broker must offer before the application starts; None: replicated on networked brokers, else
        the backend's best.
    start_deadline: how long a networked broker that cannot be reached, or is catching up, is waited for at the start.
    source: CloudEvents source of what is published.
    backends: a section for each backend, checked by the backend.
    Raises ConfigurationError naming each wrong setting, where it came from and what it must be.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        env_ignore_empty=True,
        env_file=ENV_FILE,
        toml_file=SETTINGS_FILE,
        pyproject_toml_table_header=("tool", "reliamq"),
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    broker: str = Field(default="embedded:///reliamq.db", repr=False)
    database: str | None = Field(default=None, repr=False)
    leases: str | None = Field(default=None, repr=False)
    durability: Durability | None = None
    start_deadline: Duration = Field(default=timedelta(seconds=30), ge=timedelta(0), le=DAY)
    source: str = "reliamq"
    worker: WorkerSettings = WorkerSettings()
    publisher: PublisherSettings = PublisherSettings()
    outbox: OutboxSettings = OutboxSettings()
    relay: RelaySettings = RelaySettings()
    backends: dict[str, dict[str, Any]] = Field(default_factory=dict, repr=False)

    if not TYPE_CHECKING:  # as above

        def __init__(self, **values):
            with clear_faults(type(self), lambda: self._origins(values)):
                super().__init__(**values)

    @field_validator("durability", mode="before")
    @classmethod
    def _durability_by_name(cls, value: object) -> object:
        try:
            return None if value is None else Durability.named("durability", value)
        except ConfigurationError as error:
            raise ValueError(str(error).removeprefix("durability ")) from None

    @field_validator("broker")
    @classmethod
    def _broker_is_a_url(cls, value: str) -> str:
        if "://" not in value:
            raise ValueError("is no URL; write something like embedded:///app.db or kafka://host:9092")
        return value

    @field_validator("leases")
    @classmethod
    def _leases_are_at_a_url(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError("is no URL; write something like redis://host")
        return value

    @model_validator(mode="after")
    def _two_files(self) -> Settings:
        file = _file_of(self.database) if (self.database or "").startswith("sqlite") else None
        if file is not None and file == _file_of(self.broker):
            raise ValueError(f"broker and database are the same file {file}; each needs one of its own")
        return self

    def __repr_args__(self) -> Any:
        yield "broker", masked(self.broker)
        yield "database", None if self.database is None else masked(self.database)
        yield "leases", None if self.leases is None else masked(self.leases)
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
            OurVariables(settings_cls, env_settings, ENVIRONMENT),
            OurVariables(settings_cls, dotenv_settings, ENV_FILE),
            TomlConfigSettingsSource(settings_cls),
            PyprojectTomlConfigSettingsSource(settings_cls),
        )

    @classmethod
    def _origins(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
        return [
            ("code", arguments),
            (ENVIRONMENT, EnvSettingsSource(cls)()),
            (ENV_FILE, DotEnvSettingsSource(cls)()),
            (str(SETTINGS_FILE), TomlConfigSettingsSource(cls)()),
            (str(PYPROJECT), PyprojectTomlConfigSettingsSource(cls)()),
        ]


def load_settings(**arguments: object) -> Settings:
    """The same as ``Settings(…)``, for arguments whose names are not known before."""
    return Settings(**cast("dict[str, Any]", arguments))


def _file_of(url: str | None) -> str | None:
    """The file that a URL of the form ``scheme:///path`` names."""
    parts = urlsplit(url or "")
    path = unquote(parts.path[1:])
    return os.path.realpath(path) if path and not parts.netloc else None
