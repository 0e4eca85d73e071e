"""The embedded broker in memory keeps every promise."""

import uuid

import pytest

from reliamq.backends import open_backend
from reliamq.testing.conformance import *  # noqa: F403  # the kit's tests
from reliamq.testing.harness import MakeBackend


@pytest.fixture
def make_backend() -> MakeBackend:
    name = uuid.uuid4()
    return lambda: open_backend(f"memory://{name}")
