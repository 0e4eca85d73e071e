"""The embedded broker in a file keeps every promise."""

from pathlib import Path

import pytest

from reliamq.backends import open_backend
from reliamq.testing.conformance import *  # noqa: F403  # the kit's tests
from reliamq.testing.harness import MakeBackend


@pytest.fixture
def make_backend(tmp_path: Path) -> MakeBackend:
    return lambda: open_backend(f"embedded:///{tmp_path}/broker.db")
