"""The test-bed itself: Redis and Valkey servers in three shapes that can be broken, one by one and all at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

from tests.servers.cluster import PASSWORD, USER
from tests.servers.process import ServerProcess
from tests.servers.proxy import Proxy
from tests.servers.redis import SERVICE, RedisServers

KINDS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ("redis", "valkey")]
AS_NOBODY = ["/usr/bin/setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


@pytest.fixture(params=KINDS)
def servers(request: pytest.FixtureRequest) -> RedisServers:
    """Of each kind, whole, and made so again afterwards."""
    found = request.getfixturevalue(f"whole_{request.param}")
    assert isinstance(found, RedisServers)
    return found


@pytest.fixture
def key() -> str:
    return f"test-{uuid.uuid4()}"


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ask(servers: RedisServers, server: ServerProcess, *command: str) -> Any:
    with servers.client(server) as client:
        return client.execute_command(*command)


def role(servers: RedisServers, server: ServerProcess) -> str:
    return str(ask(servers, server, "INFO", "replication")["role"])


def roles(servers: RedisServers, several: Sequence[ServerProcess]) -> list[str]:
    return [role(servers, server) for server in several]


def add(servers: RedisServers, server: ServerProcess, key: str) -> None:
    """A message that the server's replica has, too."""
    with servers.client(server) as client:
        client.xadd(key, {"is": "confirmed"})
        assert client.wait(1, 2000) == 1


def length(servers: RedisServers, server: ServerProcess, key: str) -> int:
    return int(ask(servers, server, "XLEN", key))


def connected_to_cluster(servers: RedisServers) -> RedisCluster:
    port = servers.ports[servers.cluster_nodes[0]].plain
    return RedisCluster(host="127.0.0.1", port=port, username=USER, password=PASSWORD)


def kill_at_once(several: Sequence[ServerProcess]) -> None:
    with ThreadPoolExecutor(len(several)) as pool:
        list(pool.map(ServerProcess.kill, several))


def test_a_pair_a_watched_pair_and_a_cluster_run(servers: RedisServers) -> None:
    assert role(servers, servers.primary) == "master"
    assert role(servers, servers.replica) == "slave"
    assert sorted(roles(servers, servers.sentinel_pair)) == ["master", "slave"]
    assert sorted(roles(servers, servers.cluster_nodes)) == ["master"] * 3 + ["slave"] * 3
    for server in servers.servers:
        name = psutil.Process(int((server.folder / "pid").read_text())).name()
        assert name in ("redis-server", "valkey-server", "stunnel4")  # not a shell that waits for it


def test_the_user_signs_in_and_so_does_anybody(servers: RedisServers) -> None:
    for server in (servers.primary, servers.sentinels[0], servers.cluster_nodes[0]):
        assert ask(servers, server, "ACL WHOAMI") == USER
        with Redis(port=servers.ports[server].plain) as nobody:
            assert nobody.execute_command("ACL WHOAMI") == "default"


def test_what_a_replica_confirmed_survives_the_death_of_the_primary(servers: RedisServers, key: str) -> None:
    add(servers, servers.primary, key)
    servers.primary.kill()
    with pytest.raises(RedisConnectionError):
        ask(servers, servers.primary, "PING")

    servers.primary.start()
    servers.wait_until_whole()

    assert length(servers, servers.primary, key) == length(servers, servers.replica, key) == 1


def test_sentinels_promote_the_replica_and_the_old_primary_follows_it(servers: RedisServers, key: str) -> None:
    old = servers.current_primary()
    [new] = [server for server in servers.sentinel_pair if server is not old]
    add(servers, old, key)
    old.kill()
    eventually(lambda: servers.current_primary() is new)
    ask(servers, new, "XADD", key, "*", "is", "not confirmed")  # nobody is there to confirm it

    old.start()
    servers.wait_until_whole()

    assert (role(servers, old), role(servers, new)) == ("slave", "master")
    assert servers.current_primary() is new
    assert length(servers, old, key) == 2


def test_a_client_finds_the_primary_by_asking_a_sentinel(servers: RedisServers) -> None:
    addresses = [("127.0.0.1", servers.ports[sentinel].plain) for sentinel in servers.sentinels]
    credentials = {"username": USER, "password": PASSWORD}
    found: Any = Sentinel(addresses, sentinel_kwargs=credentials, **credentials)  # type: ignore[no-untyped-call]

    assert found.discover_master(SERVICE) == ("127.0.0.1", servers.ports[servers.current_primary()].plain)
    with found.master_for(SERVICE) as client:
        assert client.info("replication")["role"] == "master"
    for sentinel in found.sentinels:
        sentinel.close()


def test_the_cluster_answers_for_every_slot(servers: RedisServers, key: str) -> None:
    for node in servers.cluster_nodes:
        assert ask(servers, node, "CLUSTER INFO")["cluster_slots_ok"] == "16384"
    with connected_to_cluster(servers) as client:
        for number in range(30):
            client.xadd(f"{key}-{number}", {"is": "somewhere"})
        assert sum(client.xlen(f"{key}-{number}") for number in range(30)) == 30


def test_a_replica_of_the_cluster_takes_over_from_its_primary(servers: RedisServers) -> None:
    old = next(node for node in servers.cluster_nodes if role(servers, node) == "master")
    replica_port = ask(servers, old, "INFO", "replication")["slave0"]["port"]
    [new] = [node for node in servers.cluster_nodes if servers.ports[node].plain == replica_port]
    old.kill()
    eventually(lambda: role(servers, new) == "master")

    old.start()
    servers.wait_until_whole()

    assert role(servers, old) == "slave"


def test_what_was_confirmed_is_there_after_all_were_killed(servers: RedisServers, key: str) -> None:
    add(servers, servers.primary, key)
    add(servers, servers.current_primary(), key)
    with connected_to_cluster(servers) as client:
        client.xadd(key, {"is": "on disk"})
    identities = [ask(servers, node, "CLUSTER MYID") for node in servers.cluster_nodes]

    kill_at_once(servers.servers)
    servers.start()
    servers.wait_until_whole()

    assert length(servers, servers.primary, key) == 1
    assert length(servers, servers.current_primary(), key) == 1
    with connected_to_cluster(servers) as client:
        assert client.xlen(key) == 1
    assert [ask(servers, node, "CLUSTER MYID") for node in servers.cluster_nodes] == identities  # not made anew


def test_a_paused_primary_answers_nothing_until_it_is_resumed(servers: RedisServers) -> None:
    servers.primary.pause()
    with pytest.raises(RedisError):
        ask(servers, servers.primary, "PING")
    assert servers.primary.running
    servers.primary.resume()

    assert ask(servers, servers.primary, "PING")


def test_a_client_signs_in_over_tls(servers: RedisServers) -> None:
    for server in (servers.primary, servers.replica):
        with Redis(
            host="127.0.0.1",
            port=servers.ports[server].secure,
            username=USER,
            password=PASSWORD,
            ssl=True,
            ssl_ca_certs=str(servers.certificate_authority),
        ) as client:
            assert client.execute_command("ACL WHOAMI") == USER
    assert str(servers.ports[servers.primary].secure) in servers.secure_url


def test_a_proxy_in_front_of_the_primary_cuts_a_client_off(servers: RedisServers) -> None:
    ports = servers.ports[servers.primary]
    with Proxy(ports.proxied, ports.plain) as proxy, Redis(port=ports.proxied, retry=Retry(NoBackoff(), 0)) as client:
        assert client.ping()
        proxy.refuse()  # a mere cut is not noticed: an idle connection that is gone is replaced
        with pytest.raises(RedisConnectionError):
            client.ping()
        assert proxy.bytes_up
        assert proxy.bytes_down


def test_only_the_primary_of_the_pair_may_be_killed_by_the_proof(servers: RedisServers) -> None:
    assert list(servers.breakable) == [servers.primary]
    command = [sys.executable, "-m", "tests.servers", servers.name, "list"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests ran as a plain user")
def test_a_plain_user_can_run_all(servers: RedisServers) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"reliamq-{servers.name}-"))  # pytest's own folders are closed to others
    type(servers).prepare(folder)
    own = type(servers).of(folder)
    subprocess.run(["/bin/chown", "-R", "nobody:nogroup", str(folder)], check=True)
    for server in own.servers:
        as_nobody(server, folder)
    try:
        own.start()
        own.wait_until_whole()
        users = {psutil.Process(int((server.folder / "pid").read_text())).username() for server in own.servers}
        assert users == {"nobody"}
    finally:
        kill_at_once(own.servers)
        shutil.rmtree(folder)


def as_nobody(server: ServerProcess, folder: Path) -> None:
    """It runs a copy of its program, because the virtual environment may be closed to others."""
    program, *arguments = server.command
    copy = folder / Path(program).name
    if not copy.exists():
        shutil.copy(program, copy)
    server.command = [*AS_NOBODY, str(copy), *arguments]
