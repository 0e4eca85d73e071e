"""How RabbitMQ is found: the entry point ``rabbitmq`` of the group ``reliamq.backends``."""

from __future__ import annotations

from collections.abc import Mapping

from reliamq.spi import Backend, Capabilities, hookimpl
from reliamq_rabbitmq.backend import CAPABILITIES, RabbitmqBackend
from reliamq_rabbitmq.settings import SCHEMES


@hookimpl
def reliamq_schemes() -> Mapping[str, Capabilities]:
    """``rabbitmq://`` and ``amqp://`` plain, ``rabbitmqs://`` and ``amqps://`` over TLS."""
    return dict.fromkeys(SCHEMES, CAPABILITIES)


@hookimpl
def reliamq_backend(url: str, settings: Mapping[str, object]) -> Backend:
    """Make the backend; opens nothing."""
    return RabbitmqBackend(url, settings)
