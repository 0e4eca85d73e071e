"""One worker process: ``python -m reliamq.cli.worker_process MODULE:APP``, started by ``reliamq run``."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time

import typer

from reliamq.cli.serving import serve
from reliamq.cli.target import TRY_AGAIN, load_shared_app, run_async

PR_SET_PDEATHSIG = 1
THREAD_SECONDS = 1.0

logger = logging.getLogger("reliamq.cli")


def main(target: str) -> None:
    """Consume until a signal says stop.  Exit code 75: broker or database could not be reached, try again."""
    if sys.platform == "linux":  # a supervisor that was killed leaves no worker behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = load_shared_app(target)
    run_async(lambda: serve(app, app.run_worker), unavailable=TRY_AGAIN)
    _leave_threads_behind()


def _leave_threads_behind() -> None:
    """End although a plain handler overran the stop deadline: its thread cannot be stopped, and Python waits for it.

    Its delivery was given back and its transaction, if it had one, dies with the process.
    """
    deadline = time.monotonic() + THREAD_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("ended while a plain handler was still running in thread '%s'", thread.name)
                logging.shutdown()
                os._exit(0)


if __name__ == "__main__":
    typer.run(main)
