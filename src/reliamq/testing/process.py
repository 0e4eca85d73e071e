"""What the kit runs in a process of its own: ``python -m reliamq.testing.process TOPIC COUNT``, the URL on its input.

It publishes to a declared topic and is killed by SIGKILL the moment that all of it is confirmed, with everything open.
So who started it knows by its end that all was confirmed.  The URL may have secrets, so it is no argument.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

import anyio

from reliamq.backends import open_backend
from reliamq.spi import Confirmation, Outcome
from reliamq.testing.harness import PATIENCE, Stage


async def publish(url: str, topic: str, count: int) -> Sequence[Outcome]:
    """Publish numbered messages of one key and die; returns only when not all were confirmed."""
    stage = Stage(lambda: open_backend(url), topic)
    async with stage.backend.publisher() as publisher:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        outcomes = await publisher.send(stage.numbered(count, key=b"k"), deadline=deadline)
        if all(isinstance(one, Confirmation) for one in outcomes):
            os.kill(os.getpid(), signal.SIGKILL)
    return outcomes


if __name__ == "__main__":
    sys.exit(f"not confirmed: {anyio.run(publish, sys.stdin.read(), sys.argv[1], int(sys.argv[2]))}")
