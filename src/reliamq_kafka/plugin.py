"""How Kafka is found: the entry point ``kafka`` of the group ``reliamq.backends``."""

from __future__ import annotations

from collections.abc import Mapping

from reliamq.spi import Backend, Capabilities, hookimpl
from reliamq_kafka.backend import CAPABILITIES, KafkaBackend


@hookimpl
def reliamq_schemes() -> Mapping[str, Capabilities]:
    """``kafka://`` plain, ``kafkas://`` over TLS."""
    return {"kafka": CAPABILITIES, "kafkas": CAPABILITIES}


@hookimpl
def reliamq_backend(url: str, settings: Mapping[str, object]) -> Backend:
    """Make the backend; opens nothing."""
    return KafkaBackend(url, settings)
