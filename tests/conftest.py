"""What every test may use."""

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop that reliamq runs on."""
    return "asyncio"
