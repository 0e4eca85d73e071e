"""The command line in processes that are forked from one which has imported it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from reliamq.cli.main import main
from tests.forked import exit_code_of

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
    code = exit_code_of(_run, arguments, folder, streams, dict(environment), timeout=timeout)
    return subprocess.CompletedProcess(arguments, code, *(path.read_text() for path in streams[1:]))


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
