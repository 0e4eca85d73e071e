"""A cluster of servers that all tests share: one handle, whatever the servers are.

It lives in ``build/servers``.  A run finds the one that another left running, and starts it anew if there is none.
"""

from __future__ import annotations

import random
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Self

import trustme
from cryptography.hazmat.primitives import serialization
from filelock import FileLock

from tests.servers.installing import HOME
from tests.servers.process import ServerDidNotStart, ServerProcess, wait_until

__all__ = ["PASSWORD", "PORTS_FILE", "USER", "Cluster", "answers", "certificate_with_key", "free_ports"]

START_SECONDS = 90.0
CATCH_UP_SECONDS = 120.0
PORTS_FILE = "ports.json"
USER, PASSWORD = "reliamq-tests", "only/for@tests"  # not to be put into a URL as it is


class Cluster(ABC):
    """Handle of a cluster.

    name: of the kind of server, and of the folder in ``build/servers``.
    servers: one process each; their names tell them apart.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path, servers: Sequence[ServerProcess]) -> None:
        self.folder, self.servers = folder, servers

    @classmethod
    def shared(cls) -> Self:
        """The cluster in ``build/servers``, started anew and empty if it does not run.

        Empty, because what many runs leave behind would fill the servers' memories, and may be damaged.
        """
        HOME.mkdir(parents=True, exist_ok=True)
        with FileLock(HOME / f"{cls.name}.lock"):  # several test processes may want it at once
            if not cls.runs():
                shutil.rmtree(HOME / cls.name, ignore_errors=True)
            try:
                cluster = cls.prepared()
                cluster.start()
            except ServerDidNotStart:  # somebody may have taken one of its ports since they were drawn
                cls.prepared().stop()
                shutil.rmtree(HOME / cls.name)
                cluster = cls.prepared()
                cluster.start()
        return cluster

    @classmethod
    def prepared(cls) -> Self:
        """The cluster in ``build/servers``, made if it is not there, running or not."""
        folder = HOME / cls.name
        if not (folder / PORTS_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            cls.prepare(folder)
        return cls.of(folder)

    @classmethod
    def runs(cls) -> bool:
        """Whether any server of the cluster in ``build/servers`` runs."""
        return (HOME / cls.name / PORTS_FILE).exists() and any(server.running for server in cls.prepared().servers)

    @classmethod
    def stop_shared(cls) -> None:
        """Stop the cluster in ``build/servers`` if it runs; its data and logs stay until it is started again."""
        if cls.runs():
            cls.prepared().stop()

    @classmethod
    @abstractmethod
    def prepare(cls, folder: Path) -> None:
        """Draw ports and write what the servers need.  Last of all ``PORTS_FILE``: the folder is whole."""

    @classmethod
    @abstractmethod
    def of(cls, folder: Path) -> Self:
        """The cluster that was prepared there."""

    @property
    @abstractmethod
    def url(self) -> str:
        """reliamq's URL of it."""

    @property
    def breakable(self) -> Sequence[ServerProcess]:
        """The servers that may be killed, one at a time, under what uses ``url``: all, unless a kind says less."""
        return self.servers

    @property
    def certificate_authority(self) -> Path:
        """PEM file of who signed the servers' certificates."""
        return self.folder / "authority.pem"

    def start(self) -> None:
        """Start every server that does not run, and wait until all answer."""
        with FileLock(self.folder / "starting.lock"):  # two processes would start two of the same server
            for server in self.servers:
                server.resume()
                server.start()
        wait_until(self._all_answer, START_SECONDS, self.servers)

    def wait_until_whole(self) -> None:
        """Until every server answers and lacks nothing that another has: only then may another one be broken."""
        wait_until(self._all_answer, START_SECONDS, self.servers)
        wait_until(self._nothing_lacks, CATCH_UP_SECONDS, self.servers)

    def stop(self) -> None:
        """Stop every server."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(ServerProcess.stop, self.servers))

    @abstractmethod
    def _all_answer(self) -> bool:
        """Whether the servers answer and know all the others."""

    @abstractmethod
    def _nothing_lacks(self) -> bool:
        """Whether every replica is there."""


def free_ports(count: int, among: range) -> list[int]:
    """Ports that nobody uses.

    ``among``: another range for each kind of cluster, because two are started at once, and below the ports that the
    system lends to outgoing connections (32768 and above): what is free stays free.
    """
    free: list[int] = []
    while len(free) < count:
        port = random.choice(among)
        if port not in free and not answers(port):
            free.append(port)
    return free


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def certificate_with_key(authority: trustme.CA) -> bytes:
    """For 127.0.0.1, as every kind of server reads it: PEM, PKCS #8."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), password=None)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem + b"".join(part.bytes() for part in issued.cert_chain_pems)
