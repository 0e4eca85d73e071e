"""The pytest plugin of the kit: the ``promise`` marker, the stage, and a summary of the promises that were checked.

Loaded by ``from reliamq.testing.conformance import *``.
"""

from __future__ import annotations

import pytest

from reliamq.testing.harness import MakeBackend, Stage

__all__ = ["anyio_backend", "backend_url", "stage"]


@pytest.fixture
def anyio_backend() -> str:
    """The event loop that reliamq runs on."""
    return "asyncio"


@pytest.fixture
def backend_url(make_backend: MakeBackend) -> str:
    """The URL by which another process reaches the same broker; give your own where the backend's leaves out secrets
    or settings.
    """
    return make_backend().url


@pytest.fixture
def stage(make_backend: MakeBackend, backend_url: str) -> Stage:
    """A topic of the test's own on the backend that your ``make_backend`` fixture gives."""
    return Stage(make_backend, url=backend_url)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; ``pytest_plugins = ["reliamq.testing.plugin"]`` in a conftest brings it."""
    config.addinivalue_line("markers", "promise(*numbers): the numbered promises that a test checks")
