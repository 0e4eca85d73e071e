"""The servers that the tests run on.

python -m tests.servers start              start those that do not run; they stay up until they are stopped
python -m tests.servers stop               stop them all
python -m tests.servers run COMMAND …      start them, run the command, stop them unless they ran before

python -m tests.servers kafka list         the brokers' names; with the next two: reliamq prove --kill-broker
python -m tests.servers kafka kill NAME    SIGKILL
python -m tests.servers kafka start NAME   start it, and return when every replica is in sync again
"""

from __future__ import annotations

import subprocess
import sys
import time

from tests.servers.kafka import kafka_cluster, kafka_runs, prepared_kafka, stop_kafka


def main() -> None:
    """Do what the first argument says."""
    match sys.argv[1:]:
        case ["start"]:
            _start()
        case ["stop"]:
            stop_kafka()
        case ["run", *command] if command:
            sys.exit(_run(command))
        case ["kafka", *command]:
            _do_to_kafka(command)
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


def _do_to_kafka(command: list[str]) -> None:
    cluster = prepared_kafka()
    brokers = {str(number): broker for number, broker in enumerate(cluster.brokers, 1)}
    match command:
        case ["list"]:
            sys.stdout.write("".join(f"{name}\n" for name in brokers))
        case ["kill", name] if name in brokers:
            brokers[name].kill()
        case ["start", name] if name in brokers:
            brokers[name].start()
            cluster.wait_until_whole()
        case _:
            sys.exit(f"not list, kill or start of one of {', '.join(brokers)}: {' '.join(command)}")


if __name__ == "__main__":
    main()
