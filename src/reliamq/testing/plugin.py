"""The pytest plugin of the kit: the ``promise`` marker, the stage, and a summary of the promises that were checked.

Loaded by ``from reliamq.testing.conformance import *``.
"""

from __future__ import annotations

import pytest

from reliamq.testing.harness import MakeBackend, Stage

__all__ = ["anyio_backend", "stage"]


@pytest.fixture
def anyio_backend() -> str:
    """The event loop that reliamq runs on."""
    return "asyncio"


@pytest.fixture
def stage(make_backend: MakeBackend) -> Stage:
    """A topic of the test's own on the backend that your ``make_backend`` fixture gives."""
    return Stage(make_backend)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; ``pytest_plugins = ["reliamq.testing.plugin"]`` in a conftest brings it."""
    config.addinivalue_line("markers", "promise(*numbers): the numbered promises that a test checks")
