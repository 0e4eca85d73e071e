"""The servers that the tests run on: the clusters ``kafka``, ``rabbitmq``, ``redis`` and ``valkey``.

python -m tests.servers start [CLUSTER …]    start those that do not run; they stay up until they are stopped
python -m tests.servers stop [CLUSTER …]     stop them
python -m tests.servers run [--only CLUSTER] COMMAND …
                                             start them, run the command, stop those that did not run before

python -m tests.servers CLUSTER list         the names of those that may be killed; with the next two: reliamq prove
                                             --kill-broker
python -m tests.servers CLUSTER kill NAME    SIGKILL
python -m tests.servers CLUSTER start NAME   start it, and return when it lacks nothing any more
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from tests.servers.cluster import Cluster
from tests.servers.kafka import KafkaCluster
from tests.servers.rabbitmq import RabbitmqCluster
from tests.servers.redis import RedisServers, ValkeyServers

Kind = type[Cluster]
KINDS: dict[str, Kind] = {kind.name: kind for kind in (KafkaCluster, RabbitmqCluster, RedisServers, ValkeyServers)}


def main() -> None:
    """Do what the arguments say."""
    match sys.argv[1:]:
        case ["start", *names] if KINDS.keys() >= set(names):
            _start(_kinds(names))
        case ["stop", *names] if KINDS.keys() >= set(names):
            _stop(_kinds(names))
        case ["run", "--only", name, *command] if name in KINDS and command:
            sys.exit(_run([KINDS[name]], command))
        case ["run", *command] if command and command[0] != "--only":
            sys.exit(_run(KINDS.values(), command))
        case [name, *command] if name in KINDS:
            _do_to(KINDS[name], command)
        case _:
            sys.exit(__doc__)


def _kinds(names: Collection[str]) -> Collection[Kind]:
    return [KINDS[name] for name in names] or KINDS.values()


def _start(kinds: Collection[Kind]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(_start_one, kinds))


def _start_one(kind: Kind) -> None:
    began = time.monotonic()
    url = kind.shared().url
    sys.stdout.write(f"{kind.name} runs at {url} ({time.monotonic() - began:.1f} s)\n")
    sys.stdout.flush()


def _stop(kinds: Collection[Kind]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kind: kind.stop_shared(), kinds))


def _run(kinds: Collection[Kind], command: list[str]) -> int:
    ours = [kind for kind in kinds if not kind.runs()]
    try:
        _start(kinds)
        return subprocess.run(command).returncode
    finally:
        _stop(ours)


def _do_to(kind: Kind, command: list[str]) -> None:
    cluster = kind.prepared()
    servers = {str(number): server for number, server in enumerate(cluster.breakable, 1)}
    match command:
        case ["list"]:
            sys.stdout.write("".join(f"{name}\n" for name in servers))
        case ["kill", name] if name in servers:
            servers[name].kill()
        case ["start", name] if name in servers:
            servers[name].start()
            cluster.wait_until_whole()
        case _:
            sys.exit(f"not list, kill or start of one of {', '.join(servers)}: {' '.join(command)}")


if __name__ == "__main__":
    main()
