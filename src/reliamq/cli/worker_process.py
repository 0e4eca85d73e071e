"""One worker process: ``python -m reliamq.cli.worker_process MODULE:APP``, started by ``reliamq run``."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys

import typer

from reliamq.cli.serving import serve
from reliamq.cli.target import TRY_AGAIN, load_shared_app, run_async

PR_SET_PDEATHSIG = 1


def main(target: str) -> None:
    """Consume until a signal says stop.  Exit code 75: broker or database could not be reached, try again."""
    if sys.platform == "linux":  # a supervisor that was killed leaves no worker behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = load_shared_app(target)
    run_async(lambda: serve(app, app.run_worker), unavailable=TRY_AGAIN)


if __name__ == "__main__":
    typer.run(main)
