"""The command line in processes that are forked from one which has imported it: a start costs a second otherwise."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from reliamq.cli.main import main

__all__ = ["run_forked"]


def run_forked(
    arguments: Sequence[str],
    *,
    folder: Path,
    files: Path,
    timeout: float = 60,
    input: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> subprocess.CompletedProcess[str]:
    """``reliamq`` with these arguments in a folder.

    files: where its three streams are kept.  environment: for what is read after the imports.
    """
    streams = tuple(files / name for name in ("stdin", "stdout", "stderr"))
    streams[0].write_text(input or "")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "reliamq.embedded.backend"])
    process = processes.Process(target=_run, args=(arguments, folder, streams, dict(environment)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(list(arguments), timeout, *(path.read_text() for path in streams[1:]))
    return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams[1:]))


def _run(arguments: Sequence[str], folder: Path, streams: Sequence[Path], environment: Mapping[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    sys.stdin = open(0)  # noqa: SIM115  # for the life of the process, instead of the fork server's
    sys.path.insert(0, "")
    sys.argv = ["reliamq", *arguments]
    main()
