"""``reliamq run``: worker processes, supervised."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from reliamq.cli.supervisor import Supervisor, worker_command
from reliamq.cli.target import Target, load_shared_app

__all__ = ["run"]


def run(
    target: Target,
    workers: Annotated[int, typer.Option(min=1, help="Processes; one that dies is started again.")] = 1,
) -> None:
    """Consume for every handler of the application, in supervised processes.

    What cannot be reached is tried again, with growing pauses.

    Exit code 2: application or configuration are wrong from the first start.

    SIGTERM or Ctrl-C once: finish what runs, acknowledge, give the rest back.  Twice: at once.  Three times: kill.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    load_shared_app(target)  # what is wrong with it is said here, once, and not by every worker
    raise typer.Exit(Supervisor(worker_command(target), workers).run())
