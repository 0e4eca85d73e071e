"""A RabbitMQ cluster of three nodes, on 127.0.0.1.

Each node listens for AMQP, for AMQP over TLS, and for the HTTP of the management plugin.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import trustme

from tests.servers.cluster import (
    PASSWORD,
    PORTS_FILE,
    USER,
    Cluster,
    answers,
    certificate_with_key,
    free_ports,
)
from tests.servers.installing import program
from tests.servers.process import ServerProcess

__all__ = [
    "PASSWORD",
    "USER",
    "RabbitmqCluster",
    "prepared_rabbitmq",
    "rabbitmq_cluster",
    "rabbitmq_runs",
    "stop_rabbitmq",
]

NODES = 3
PORTS = range(26_000, 32_000)
ANSWER_SECONDS = 5.0
PLUGINS = ("rabbitmq_management", "rabbitmq_management_agent", "rabbitmq_web_dispatch")
ERLANG_OPTIONS = "+S 1:1 +sbwt none -kernel inet_dist_use_interface {127,0,0,1} net_ticktime 20"

# A plugin has feature flags.  3.10 knows them only once it has loaded the plugin, and a node that in this moment meets
# another one, which is a little further, makes that one give up its start.
LOAD_PLUGIN_FIRST = "-eval application:load(rabbitmq_management_agent)"

# The nodes form the cluster one after the other, under a lock; the first finds nobody and need not look for long.
# A node that was frozen for more than a minute comes back by itself with autoheal, never with pause_minority.
# The limits of memory and disk are what no busy machine comes near: a node that does blocks every publisher.
SETTINGS = """\
listeners.tcp.1 = 127.0.0.1:{plain}
listeners.ssl.1 = 127.0.0.1:{secure}
ssl_options.cacertfile = {shared}/authority.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.pem
management.tcp.ip = 127.0.0.1
management.tcp.port = {management}
loopback_users = none
load_definitions = {shared}/definitions.json
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.classic_config.nodes.1 = rq1@localhost
cluster_formation.classic_config.nodes.2 = rq2@localhost
cluster_formation.classic_config.nodes.3 = rq3@localhost
cluster_formation.discovery_retry_limit = 2
cluster_formation.discovery_retry_interval = 100
cluster_partition_handling = autoheal
queue_leader_locator = balanced
vm_memory_high_watermark.absolute = 2GB
disk_free_limit.absolute = 50MB
raft.wal_max_size_bytes = 67108864
log.file = false
log.console = true
log.console.level = info
"""

Queue = tuple[str, str]  # its virtual host and its name


@dataclass(frozen=True)
class Ports:
    """plain, secure, management: where clients connect.  proxied: where a proxy listens, for ``plain``.

    distribution: where the other nodes connect.  epmd: of the daemon that tells them where; the same for all nodes.
    """

    epmd: int
    distribution: int
    plain: int
    proxied: int
    secure: int
    management: int


class RabbitmqCluster(Cluster):
    """Handle of the cluster.  nodes: one server process each, numbered from 1 in their names."""

    name = "rabbitmq"

    def __init__(self, folder: Path, ports: list[Ports]) -> None:
        self.ports = ports
        self.nodes = [
            ServerProcess(
                f"rabbitmq {number}",
                folder / str(number),
                [str(folder / "installation" / "sbin" / "rabbitmq-server")],
                _environment(folder, number, each),
            )
            for number, each in enumerate(ports, 1)
        ]
        super().__init__(folder, self.nodes)

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The cluster that was prepared there."""
        return cls(folder, [Ports(**each) for each in json.loads((folder / PORTS_FILE).read_text())])

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """Draw ports and write each node's settings and certificate, and what all nodes share."""
        epmd, *free = free_ports(1 + 5 * NODES, PORTS)
        ports = [Ports(epmd, *free[5 * number : 5 * number + 5]) for number in range(NODES)]
        _link_installation(folder / "installation")
        _write_shared(folder)
        _write_nodes(folder, ports)
        (folder / PORTS_FILE).write_text(json.dumps([vars(each) for each in ports]))

    @property
    def addresses(self) -> list[str]:
        """``host:port`` of each node, plain."""
        return [f"127.0.0.1:{ports.plain}" for ports in self.ports]

    @property
    def url(self) -> str:
        """reliamq's URL of it."""
        return _url("rabbitmq", [ports.plain for ports in self.ports])

    @property
    def proxied_url(self) -> str:
        """The same through the ports on which a test runs proxies."""
        return _url("rabbitmq", [ports.proxied for ports in self.ports])

    @property
    def secure_url(self) -> str:
        """The same over TLS."""
        return _url("rabbitmqs", [ports.secure for ports in self.ports])

    @property
    def management_url(self) -> str:
        """Of the first node."""
        return self.management_urls[0]

    @property
    def management_urls(self) -> list[str]:
        """Of each node, without user and password."""
        return [f"http://127.0.0.1:{ports.management}" for ports in self.ports]

    def stop(self) -> None:
        """Stop every node, and the daemon that the first of them started."""
        super().stop()
        epmd = [program("epmd", "rabbitmq-server"), "-port", str(self.ports[0].epmd), "-kill"]
        subprocess.run(epmd, check=False, stdout=subprocess.DEVNULL)

    def control(self, node: ServerProcess, *arguments: str) -> str:
        """What ``rabbitmqctl`` says to ``arguments``, for that node."""
        number = self.nodes.index(node)
        done = subprocess.run(
            [str(self.folder / "installation" / "sbin" / "rabbitmqctl"), *arguments],
            env=_environment(self.folder, number + 1, self.ports[number]),
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout

    def call(self, path: str) -> Any:
        """What the management API says, of the first node that answers.  path: such as ``queues/%2F/NAME``.

        Raises HTTPError where it refuses, OSError where no node answers.
        """
        silence: OSError = OSError("no node")
        for url in self.management_urls:
            try:
                return _ask(url, path)
            except HTTPError:
                raise
            except OSError as error:
                silence = error
        raise silence

    def clear(self) -> None:
        """Delete the queues that tests have made: each costs its nodes something for as long as it is there, and a
        node that starts again more.  One that cannot be deleted just now stays.
        """
        with suppress(OSError), ThreadPoolExecutor() as pool:
            found = [(queue["vhost"], queue["name"]) for queue in self.call("queues?columns=vhost,name")]
            list(pool.map(self._delete, [queue for queue in found if not queue[1].startswith("reliamq.")]))

    def _delete(self, queue: Queue) -> None:
        with suppress(OSError):
            _ask(self.management_url, "/".join(("queues", *(quote(part, safe="") for part in queue))), "DELETE")

    @contextmanager
    def virtual_host(self) -> Iterator[str]:
        """The name of one that is empty, and gone at the end.

        For whoever deletes what is there once only: a queue of an old name on a node that is killed a second later may
        lack that member for ever (RabbitMQ 3.10: ``could not be restarted``).
        """
        name = secrets.token_hex(8)
        _ask(self.management_url, f"vhosts/{name}", "PUT")
        everything = dict.fromkeys(("configure", "write", "read"), ".*")
        _ask(self.management_url, f"permissions/{name}/{quote(USER, safe='')}", "PUT", everything)
        try:
            yield name
        finally:
            _ask(self.management_url, f"vhosts/{name}", "DELETE")

    def _all_answer(self) -> bool:
        if not all(answers(ports.plain) for ports in self.ports):
            return False
        try:
            return all(self._nodes_seen(url) == len(self.nodes) for url in self.management_urls)
        except OSError:
            return False

    def _nodes_seen(self, url: str) -> int:
        """How many run, and have not lost sight of another one."""
        return sum(node["running"] and not node.get("partitions") for node in _ask(url, "nodes"))

    def _nothing_lacks(self) -> bool:
        """Whether every queue would survive the loss of one node, unless it is made to be on fewer than three."""
        try:
            critical = self.critical_queues()
            return not critical or critical <= self._small_queues()
        except OSError:
            return False

    def critical_queues(self) -> set[Queue]:
        """Those that would be lost with one more node.  Raises OSError where a node that runs does not answer."""
        urls = [url for node, url in zip(self.nodes, self.management_urls, strict=True) if node.running]
        return {queue for url in urls for queue in _critical_queues(url)}

    def _small_queues(self) -> set[Queue]:
        queues = self.call("queues?columns=vhost,name,arguments")
        return {
            (queue["vhost"], queue["name"])
            for queue in queues
            if queue["arguments"].get("x-quorum-initial-group-size", NODES) < NODES
        }


rabbitmq_cluster = RabbitmqCluster.shared
rabbitmq_runs = RabbitmqCluster.runs
stop_rabbitmq = RabbitmqCluster.stop_shared
prepared_rabbitmq = RabbitmqCluster.prepared


def _url(scheme: str, ports: list[int]) -> str:
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"{scheme}://{quote(USER, safe='')}:{quote(PASSWORD, safe='')}@{addresses}"


def _ask(url: str, path: str, method: str = "GET", body: object = None) -> Any:
    directly = build_opener(ProxyHandler({}))  # whatever proxy this machine uses otherwise
    directly.addheaders = [("Authorization", f"Basic {b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}")]
    data = json.dumps(body).encode() if body is not None else None
    request = Request(f"{url}/api/{path}", data, {"Content-Type": "application/json"}, method=method)  # noqa: S310  # http
    with directly.open(request, timeout=ANSWER_SECONDS) as answer:
        return json.loads(answer.read() or b"null")


def _critical_queues(url: str) -> set[Queue]:
    """Those of that node that would be lost with one more node.

    The API's own check, because what it says of a queue's members elsewhere is seconds old.
    """
    try:
        _ask(url, "health/checks/node-is-quorum-critical")
    except HTTPError as refusal:
        if refusal.code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        return {(queue["virtual_host"], queue["name"]) for queue in json.load(refusal)["queues"]}
    return set()


def _environment(folder: Path, number: int, ports: Ports) -> dict[str, str]:
    """For the node, and for what controls it."""
    own = folder / str(number)
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),  # the cookie, by which the nodes know each other, is there
        "ERL_EPMD_PORT": str(ports.epmd),  # none of the machine's: its names are ours alone
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the virtual machine; it would wait for it otherwise
        "RABBITMQ_SCRIPTS_DIR": str(folder / "installation" / "sbin"),
        "RABBITMQ_NODENAME": f"rq{number}@localhost",
        "RABBITMQ_DIST_PORT": str(ports.distribution),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "RABBITMQ_CONFIG_FILE": str(own / "rabbitmq"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(own / "data"),
        "RABBITMQ_LOG_BASE": str(own),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_OPTIONS,
        "ERL_AFLAGS": LOAD_PLUGIN_FIRST,
    }


def _link_installation(folder: Path) -> None:
    """RabbitMQ without the plugins that nobody uses: each module is looked for in every plugin's folder.

    A node starts in half the time.
    """
    installed = Path(program("/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server")).resolve().parents[1]
    (folder / "plugins").mkdir(parents=True)
    for part in ("sbin", "escript"):
        (folder / part).symlink_to(installed / part)
    for plugin in (installed / "plugins").iterdir():
        name = plugin.name.rpartition("-")[0]
        if name in (*PLUGINS, "rabbitmq_prelaunch") or not name.startswith("rabbitmq_"):
            (folder / "plugins" / plugin.name).symlink_to(plugin)


def _write_shared(folder: Path) -> None:
    (folder / "enabled_plugins").write_text("[rabbitmq_management].\n")
    cookie = folder / ".erlang.cookie"
    cookie.write_text(secrets.token_hex(20))
    cookie.chmod(0o400)
    users = {USER: PASSWORD, "guest": "guest"}
    everything = {"vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
    definitions = {
        "vhosts": [{"name": "/"}],
        "users": [{"name": user, "password": password, "tags": ["administrator"]} for user, password in users.items()],
        "permissions": [{"user": user, **everything} for user in users],
    }
    (folder / "definitions.json").write_text(json.dumps(definitions))


def _write_nodes(folder: Path, ports: list[Ports]) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    for number, each in enumerate(ports, 1):
        own = folder / str(number)
        own.mkdir()
        (own / "rabbitmq.conf").write_text(SETTINGS.format(folder=own, shared=folder, **vars(each)))
        (own / "server.pem").write_bytes(certificate_with_key(authority))
