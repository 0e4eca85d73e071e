"""What may be set for Kafka, and how its URLs are read.

It promises that every wrong part of a URL or of the settings is named, and that nothing can be set which would weaken
a promise.  Nothing is connected here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from reliamq.spi import WORKER_NUMBER, ConfigurationError
from reliamq.spi.connecting import contradictions, described, read_url, tls_context, values_of

__all__ = ["KafkaSettings", "read_settings"]

FORBIDDEN = {
    "acks": "a confirmation needs every in-sync replica (acks=all)",
    "enable_idempotence": "without it the client's own retries would double and reorder messages",
    "enable_auto_commit": "it commits what was handed out, not what was handled",
    "auto_offset_reset": "groups start where they were declared; anything else skips messages",
    "isolation_level": "what a transaction has not committed is no message (read_committed)",
    "transactional_id": "reliamq does not use Kafka's transactions",
    "retries": "retrying ends by the caller's deadline",
    "max_in_flight_requests_per_connection": "more than one would reorder",
}
DEFAULT_PORT = 9092


class KafkaSettings(BaseModel):
    """Settings of Kafka, from its section of the configuration or the URL's query.

    servers: ``host:port`` of some brokers.
    partitions: of a topic that ``declare`` creates; how many workers of one group can share it.
    replication_factor, min_insync_replicas: of a topic that ``declare`` creates.
    request_timeout_seconds: how long one request may take before another broker is asked.
    session_timeout_seconds: how long a silent member keeps its partitions.
    rebalance_timeout_seconds: how long members may finish what has started before their partitions go to others.
    poll_interval_seconds: how long a member may ask for nothing before it loses its partitions.  A slow handler does
        not need it longer: reliamq asks on beside it.
    trim_interval_seconds: how often what every group has finished and what is older than its topic keeps is removed.
    instance_id: a name that is this process's alone and stays over restarts: it then gets its partitions back without
        stirring up the group (KIP-345).  ``{worker}`` in it is the number of the worker among those of `reliamq run`,
        which share a configuration and must not share a name.
    username, password, mechanism: SASL.  tls: with ``ca_file`` or the system's authorities; ``cert_file`` and
        ``key_file`` are the client's own certificate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    servers: tuple[str, ...]
    partitions: int = Field(default=12, ge=1, le=10_000)
    replication_factor: int = Field(default=3, ge=1, le=100)
    min_insync_replicas: int = Field(default=2, ge=1, le=100)
    request_timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    session_timeout_seconds: float = Field(default=10.0, ge=6, le=1800)
    rebalance_timeout_seconds: float = Field(default=30.0, ge=1, le=3600)
    poll_interval_seconds: float = Field(default=300.0, ge=5, le=86_400)
    trim_interval_seconds: float = Field(default=60.0, ge=0.1, le=86_400)
    instance_id: str | None = Field(default=None, min_length=1, max_length=200)
    username: str | None = None
    password: SecretStr | None = None
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    @property
    def member_name(self) -> str | None:
        """``instance_id``, of this worker."""
        return self.instance_id and self.instance_id.replace("{worker}", os.environ.get(WORKER_NUMBER, "0"))

    @property
    def url(self) -> str:
        """Where it is, without secrets."""
        return f"{'kafkas' if self.tls else 'kafka'}://{','.join(self.servers)}"

    def connection(self) -> dict[str, Any]:
        """The client's keyword arguments for connecting.  Raises ConfigurationError for certificates it cannot read."""
        wanted: dict[str, Any] = {
            "bootstrap_servers": list(self.servers),
            "request_timeout_ms": int(self.request_timeout_seconds * 1000),
            "security_protocol": f"{'SASL_' if self.username else ''}{'SSL' if self.tls else 'PLAINTEXT'}",
        }
        if self.username is not None:
            wanted["sasl_mechanism"] = self.mechanism
            wanted["sasl_plain_username"] = self.username
            wanted["sasl_plain_password"] = self.password.get_secret_value() if self.password else ""
        if self.tls:
            wanted["ssl_context"] = tls_context(self)
        return wanted


def read_settings(url: str, section: Mapping[str, object]) -> KafkaSettings:
    """Read ``kafka://[user:password@]host[:port],host[:port]…[?setting=value]``; ``kafkas://`` is TLS.

    section: the backend's own part of the configuration; the URL's query goes before it.
    Raises ConfigurationError naming the part that is wrong, never showing a password.
    """
    parts = read_url(url, default_port=DEFAULT_PORT)
    if parts.path is not None:
        raise ConfigurationError(f"{parts.plain}: '/{parts.path}' has no meaning there; topics are named in the code")
    values = values_of(parts, section, FORBIDDEN)
    if parts.scheme == "kafkas":
        values["tls"] = True
    return _checked(parts.plain, values)


def _checked(url: str, values: Mapping[str, object]) -> KafkaSettings:
    try:
        settings = KafkaSettings.model_validate(values)
    except ValidationError as error:
        faults = described(error.errors(include_input=False, include_url=False))
        raise ConfigurationError(f"{url}: settings of Kafka: {faults}") from error
    for fault in _contradictions(settings):
        raise ConfigurationError(f"{url}: {fault}")
    return settings


def _contradictions(settings: KafkaSettings) -> Iterator[str]:
    """Settings that are fine by themselves and not together."""
    least, replicas = settings.min_insync_replicas, settings.replication_factor
    if least > replicas:
        yield f"min_insync_replicas {least} is more than replication_factor {replicas}, so nothing can be confirmed"
    yield from contradictions(settings)
