"""A Kafka cluster of three brokers on three racks, on 127.0.0.1.

Each broker has three listeners: plain, plain through a port on which a test may put a proxy, and TLS with SASL.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import trustme
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from cryptography.hazmat.primitives import serialization
from filelock import FileLock

from tests.servers.installing import HOME, kafka_jars, program
from tests.servers.process import ServerDidNotStart, ServerProcess, wait_until

__all__ = ["PASSWORD", "USER", "KafkaCluster", "kafka_cluster", "kafka_runs", "prepared_kafka", "stop_kafka"]

BROKERS = 3
START_SECONDS = 90.0
CATCH_UP_SECONDS = 120.0
USER, PASSWORD = "reliamq-tests", "only/for@tests"
JAVA_OPTIONS = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]

PROPERTIES = """\
process.roles=broker,controller
node.id={number}
broker.rack=rack{number}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listeners=PLAIN://127.0.0.1:{plain},PROXIED://127.0.0.1:{behind},SECURE://127.0.0.1:{secure},\
CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAIN://127.0.0.1:{plain},PROXIED://127.0.0.1:{proxied},SECURE://127.0.0.1:{secure}
listener.security.protocol.map=PLAIN:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL
inter.broker.listener.name=PLAIN
log.dirs={folder}/data
default.replication.factor=3
min.insync.replicas=2
offsets.topic.replication.factor=3
offsets.topic.num.partitions=6
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
unclean.leader.election.enable=false
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
log.retention.check.interval.ms=5000
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512
listener.name.secure.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
user_{user}="{password}";
listener.name.secure.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.ssl.keystore.type=PEM
listener.name.secure.ssl.keystore.location={folder}/server.pem
"""


@dataclass(frozen=True)
class Ports:
    """plain, secure: where clients connect.  proxied: where a proxy listens, for the broker's port ``behind``."""

    plain: int
    proxied: int
    behind: int
    secure: int
    controller: int


class KafkaCluster:
    """Handle of the cluster.  brokers: one server process each, numbered from 1 in their names."""

    def __init__(self, folder: Path, ports: list[Ports]) -> None:
        self.folder, self.ports = folder, ports
        java, classpath = program("java", "default-jre-headless"), f"{kafka_jars()}/*"
        self.brokers = [
            ServerProcess(
                f"kafka {number}",
                folder / str(number),
                [java, *JAVA_OPTIONS, "-cp", classpath, "kafka.Kafka", "server.properties"],
            )
            for number in range(1, len(ports) + 1)
        ]

    @property
    def addresses(self) -> list[str]:
        """``host:port`` of each broker, plain."""
        return [f"127.0.0.1:{ports.plain}" for ports in self.ports]

    @property
    def url(self) -> str:
        """reliamq's URL of it."""
        return f"kafka://{','.join(self.addresses)}"

    @property
    def proxied_url(self) -> str:
        """The same through the ports on which a test runs proxies."""
        return f"kafka://{','.join(f'127.0.0.1:{ports.proxied}' for ports in self.ports)}"

    @property
    def secure_addresses(self) -> list[str]:
        """``host:port`` of each broker, TLS with SASL."""
        return [f"127.0.0.1:{ports.secure}" for ports in self.ports]

    @property
    def certificate_authority(self) -> Path:
        """PEM file of who signed the brokers' certificates."""
        return self.folder / "authority.pem"

    def start(self) -> None:
        """Start every broker that does not run, and wait until all answer."""
        with FileLock(self.folder / "starting.lock"):  # two processes would start two of the same broker
            for broker in self.brokers:
                broker.resume()
                broker.start()
        wait_until(self._all_answer, START_SECONDS, self.brokers)

    def wait_until_whole(self) -> None:
        """Until every broker answers and every replica is in sync: only then may another one be broken."""
        wait_until(self._all_answer, START_SECONDS, self.brokers)
        wait_until(lambda: asyncio.run(self._replicas_behind()) == 0, CATCH_UP_SECONDS, self.brokers)

    def stop(self) -> None:
        """Stop every broker."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(ServerProcess.stop, self.brokers))

    def _all_answer(self) -> bool:
        for ports in self.ports:  # first the cheap question; the client complains about every refused connection
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports.plain)):
                    return False
        return asyncio.run(self._brokers_seen()) == len(self.brokers)

    async def _brokers_seen(self) -> int:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.addresses, request_timeout_ms=3000)
        try:
            await admin.start()
            return len((await admin.describe_cluster())["brokers"])
        except (KafkaError, OSError):
            return 0
        finally:
            await admin.close()

    async def _replicas_behind(self) -> int:
        """How many are not in sync; more than none where nobody answers."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.addresses, request_timeout_ms=3000)
        try:
            await admin.start()
            topics = await admin.describe_topics()
        except (KafkaError, OSError):
            return 1
        finally:
            await admin.close()
        return sum(len(part["replicas"]) - len(part["isr"]) for topic in topics for part in topic["partitions"])


def kafka_cluster() -> KafkaCluster:
    """The cluster in ``build/servers/kafka``, started anew and empty if it does not run.

    Empty, because the topics of many runs would fill the brokers' small heaps, and what a run left may be damaged.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    with FileLock(HOME / "kafka.lock"):  # several test processes may want it at once
        if not kafka_runs():
            shutil.rmtree(HOME / "kafka", ignore_errors=True)
        try:
            cluster = prepared_kafka()
            cluster.start()
        except ServerDidNotStart:  # somebody may have taken one of its ports since they were drawn
            prepared_kafka().stop()
            shutil.rmtree(HOME / "kafka")
            cluster = prepared_kafka()
            cluster.start()
    return cluster


def kafka_runs() -> bool:
    """Whether any broker of the cluster runs."""
    return (HOME / "kafka" / "ports.json").exists() and any(broker.running for broker in prepared_kafka().brokers)


def stop_kafka() -> None:
    """Stop the cluster if it runs; its data and logs stay until it is started again."""
    if kafka_runs():
        prepared_kafka().stop()


def prepared_kafka() -> KafkaCluster:
    """The cluster in ``build/servers/kafka``, made if it is not there, running or not."""
    folder = HOME / "kafka"
    description = folder / "ports.json"
    if not description.exists():
        shutil.rmtree(folder, ignore_errors=True)
        free = _free_ports(5 * BROKERS)
        ports = [Ports(*free[5 * number : 5 * number + 5]) for number in range(BROKERS)]
        _format(folder, ports)
        description.write_text(json.dumps([vars(each) for each in ports]))  # last: the folder is whole
    return KafkaCluster(folder, [Ports(**each) for each in json.loads(description.read_text())])


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses, below those that the system lends to outgoing connections: they stay free."""
    free: list[int] = []
    while len(free) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if port not in free and probe.connect_ex(("127.0.0.1", port)):
                free.append(port)
    return free


def _format(folder: Path, ports: list[Ports]) -> None:
    """Write each broker's settings and certificate and format its storage."""
    authority = trustme.CA()
    voters = ",".join(f"{number}@127.0.0.1:{each.controller}" for number, each in enumerate(ports, 1))
    for number, each in enumerate(ports, 1):
        home = folder / str(number)
        home.mkdir(parents=True)
        settings = PROPERTIES.format(
            number=number, voters=voters, folder=home, user=USER, password=PASSWORD, **vars(each)
        )
        (home / "server.properties").write_text(settings)
        (home / "server.pem").write_bytes(_keystore(authority))
    authority.cert_pem.write_to_path(folder / "authority.pem")
    storage_tool = [program("java", "default-jre-headless"), *JAVA_OPTIONS, "-cp", f"{kafka_jars()}/*"]
    with ThreadPoolExecutor() as pool:
        homes = [folder / str(number) for number in range(1, len(ports) + 1)]
        list(pool.map(lambda home: _format_storage(storage_tool, home), homes))


def _keystore(authority: trustme.CA) -> bytes:
    """A certificate for 127.0.0.1 with its key, as Kafka reads it: PEM, PKCS #8."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), password=None)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return pem + b"".join(part.bytes() for part in issued.cert_chain_pems)


def _format_storage(storage_tool: list[str], home: Path) -> None:
    cluster = "cmVsaWFtcS10ZXN0cy0xMQ"  # any 16 bytes in base64
    scram = f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"
    subprocess.run(
        [*storage_tool, "kafka.tools.StorageTool", "format", "-t", cluster, "-S", scram, "-c", "server.properties"],
        cwd=home,
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
