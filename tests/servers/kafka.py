"""A Kafka cluster of three brokers on three racks, on 127.0.0.1.

Each broker has three listeners: plain, plain through a port on which a test may put a proxy, and TLS with SASL.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trustme
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from tests.servers.cluster import PASSWORD, PORTS_FILE, USER, Cluster, answers, certificate_with_key, free_ports
from tests.servers.installing import kafka_jars, program
from tests.servers.process import ServerProcess

__all__ = ["PASSWORD", "USER", "KafkaCluster", "kafka_cluster", "kafka_runs", "prepared_kafka", "stop_kafka"]

BROKERS = 3
PORTS = range(20_000, 26_000)
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


class KafkaCluster(Cluster):
    """Handle of the cluster.  brokers: one server process each, numbered from 1 in their names."""

    name = "kafka"

    def __init__(self, folder: Path, ports: list[Ports]) -> None:
        self.ports = ports
        java, classpath = program("java", "default-jre-headless"), f"{kafka_jars()}/*"
        self.brokers = [
            ServerProcess(
                f"kafka {number}",
                folder / str(number),
                [java, *JAVA_OPTIONS, "-cp", classpath, "kafka.Kafka", "server.properties"],
            )
            for number in range(1, len(ports) + 1)
        ]
        super().__init__(folder, self.brokers)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The cluster that was prepared there."""
        return cls(folder, [Ports(**each) for each in json.loads((folder / PORTS_FILE).read_text())])

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """Draw ports, write each broker's settings and certificate and format its storage."""
        free = free_ports(5 * BROKERS, PORTS)
        ports = [Ports(*free[5 * number : 5 * number + 5]) for number in range(BROKERS)]
        _format(folder, ports)
        (folder / PORTS_FILE).write_text(json.dumps([vars(each) for each in ports]))

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

    def _all_answer(self) -> bool:
        if not all(answers(ports.plain) for ports in self.ports):  # the client complains about every refusal
            return False
        return asyncio.run(self._brokers_seen()) == len(self.brokers)

    def _nothing_lacks(self) -> bool:
        """Whether every replica is in sync."""
        return asyncio.run(self._replicas_behind()) == 0

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


kafka_cluster = KafkaCluster.shared
kafka_runs = KafkaCluster.runs
stop_kafka = KafkaCluster.stop_shared
prepared_kafka = KafkaCluster.prepared


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
        (home / "server.pem").write_bytes(certificate_with_key(authority))
    authority.cert_pem.write_to_path(folder / "authority.pem")
    storage_tool = [program("java", "default-jre-headless"), *JAVA_OPTIONS, "-cp", f"{kafka_jars()}/*"]
    with ThreadPoolExecutor() as pool:
        homes = [folder / str(number) for number in range(1, len(ports) + 1)]
        list(pool.map(lambda home: _format_storage(storage_tool, home), homes))


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
