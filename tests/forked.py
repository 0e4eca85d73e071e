"""Processes that are forked from one which has imported the command line and the backends: a start costs a second
otherwise.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

__all__ = ["exit_code_of"]

PRELOADED = ["reliamq.cli.main", "reliamq.embedded.backend", "reliamq_kafka.backend"]


def exit_code_of(target: Callable[..., None], *arguments: object, timeout: float) -> int:
    """Run a module's function in a process of its own.  Raises TimeoutError after so many seconds; it is killed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    process = processes.Process(target=target, args=arguments)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{target.__module__}.{target.__name__} has not ended within {timeout} s")
    return process.exitcode
