"""How the embedded broker is found: the entry point ``embedded`` of the group ``reliamq.backends``."""

from __future__ import annotations

from collections.abc import Mapping

from reliamq.embedded.backend import FILE, MEMORY, EmbeddedBackend
from reliamq.spi import Backend, Capabilities, hookimpl


@hookimpl
def reliamq_schemes() -> Mapping[str, Capabilities]:
    """``embedded://`` for a file, ``memory://`` for tests."""
    return {"embedded": FILE, "memory": MEMORY}


@hookimpl
def reliamq_backend(url: str, settings: Mapping[str, object]) -> Backend:
    """Make the backend; opens nothing."""
    return EmbeddedBackend(url, settings)
