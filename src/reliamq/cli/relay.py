"""``reliamq relay``: sends what the outbox holds."""

from __future__ import annotations

import logging

from reliamq.cli.serving import serve
from reliamq.cli.target import Target, load_app, run_async

__all__ = ["relay"]


def relay(target: Target) -> None:
    """Relay the outbox of the configured database until SIGTERM or Ctrl-C.  Run as many as you like."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    app = load_app(target)
    run_async(lambda: serve(app, app.run_relay))
