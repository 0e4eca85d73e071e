"""The servers that the tests run on.

python -m tests.servers start              start those that do not run; they stay up until they are stopped
python -m tests.servers stop               stop them all
python -m tests.servers run COMMAND …      start them, run the command, stop them unless they ran before
"""

from __future__ import annotations

import subprocess
import sys
import time

from tests.servers.kafka import kafka_cluster, kafka_runs, stop_kafka


def main() -> None:
    """Do what the first argument says."""
    match sys.argv[1:]:
        case ["start"]:
            _start()
        case ["stop"]:
            stop_kafka()
        case ["run", *command] if command:
            sys.exit(_run(command))
        case _:
            sys.exit(__doc__)


def _start() -> None:
    began = time.monotonic()
    sys.stdout.write(f"kafka runs at {kafka_cluster().url} ({time.monotonic() - began:.1f} s)\n")
    sys.stdout.flush()


def _run(command: list[str]) -> int:
    ran_before = kafka_runs()
    _start()
    try:
        return subprocess.run(command).returncode
    finally:
        if not ran_before:
            stop_kafka()


if __name__ == "__main__":
    main()
