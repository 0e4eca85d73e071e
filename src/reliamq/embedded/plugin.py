"""How the embedded broker is found: the entry point ``embedded`` of the group ``reliamq.backends``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reliamq.embedded.backend import EmbeddedBackend
from reliamq.spi import Backend, hookimpl


@hookimpl
def reliamq_schemes() -> Sequence[str]:
    """``embedded://`` for a file, ``memory://`` for tests."""
    return ("embedded", "memory")


@hookimpl
def reliamq_backend(url: str, settings: Mapping[str, object]) -> Backend:
    """Make the backend; opens nothing."""
    return EmbeddedBackend(url, settings)
