"""What every test may use."""

from collections.abc import Iterator

import pytest

from tests.servers.kafka import KafkaCluster, kafka_cluster
from tests.servers.mariadb import MariadbServer, run_mariadb
from tests.servers.postgresql import PostgresqlServer, postgresql_15, run_postgresql
from tests.servers.rabbitmq import RabbitmqCluster, rabbitmq_cluster
from tests.servers.redis import RedisServers, ValkeyServers


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop that reliamq runs on."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresqlServer]:
    """One PostgreSQL server for the whole run, started when the first test asks for it."""
    with run_postgresql() as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql_server: PostgresqlServer) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database of a real PostgreSQL."""
    with postgresql_server.fresh_database() as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_15_server() -> Iterator[PostgresqlServer]:
    """The same of an older version."""
    with run_postgresql(postgresql_15) as server:
        yield server


@pytest.fixture
def postgresql_15_url(postgresql_15_server: PostgresqlServer) -> Iterator[str]:
    """The URL of an empty database there."""
    with postgresql_15_server.fresh_database() as url:
        yield url


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariadbServer]:
    """One MariaDB server for the whole run, started when the first test asks for it."""
    with run_mariadb() as server:
        yield server


@pytest.fixture
def mariadb_url(mariadb_server: MariadbServer) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database of a real MariaDB."""
    with mariadb_server.fresh_database() as url:
        yield url


@pytest.fixture(scope="session")
def kafka_servers() -> KafkaCluster:
    """Started once for the run."""
    return kafka_cluster()


@pytest.fixture
def kafka(kafka_servers: KafkaCluster, request: pytest.FixtureRequest) -> KafkaCluster:
    """The three-broker cluster.  A test that breaks it mends it; its tests share the xdist group ``kafka``."""
    _check_group("kafka", request)
    return kafka_servers


@pytest.fixture
def whole(kafka: KafkaCluster) -> Iterator[KafkaCluster]:
    """The cluster, made whole again afterwards."""
    yield kafka
    kafka.start()


@pytest.fixture(scope="session")
def rabbitmq_servers() -> RabbitmqCluster:
    """Started once for the run."""
    return rabbitmq_cluster()


@pytest.fixture
def rabbitmq(rabbitmq_servers: RabbitmqCluster, request: pytest.FixtureRequest) -> Iterator[RabbitmqCluster]:
    """The three-node cluster.  A test that breaks it mends it; its tests share the xdist group ``rabbitmq``."""
    _check_group("rabbitmq", request)
    yield rabbitmq_servers
    rabbitmq_servers.clear()


@pytest.fixture
def whole_rabbitmq(rabbitmq: RabbitmqCluster) -> Iterator[RabbitmqCluster]:
    """The cluster, whole, and made so again afterwards."""
    rabbitmq.wait_until_whole()
    yield rabbitmq
    rabbitmq.start()
    rabbitmq.wait_until_whole()


@pytest.fixture(scope="session")
def redis_servers() -> RedisServers:
    """Started once for the run."""
    return RedisServers.shared()


@pytest.fixture
def redis(redis_servers: RedisServers, request: pytest.FixtureRequest) -> RedisServers:
    """The Redis servers.  A test that breaks one mends it; their tests share the xdist group ``redis``."""
    _check_group("redis", request)
    return redis_servers


@pytest.fixture
def whole_redis(redis: RedisServers) -> Iterator[RedisServers]:
    """The Redis servers, whole, and made so again afterwards."""
    redis.wait_until_whole()
    yield redis
    redis.start()
    redis.wait_until_whole()


@pytest.fixture(scope="session")
def valkey_servers() -> ValkeyServers:
    """Started once for the run."""
    return ValkeyServers.shared()


@pytest.fixture
def valkey(valkey_servers: ValkeyServers, request: pytest.FixtureRequest) -> ValkeyServers:
    """The Valkey servers.  A test that breaks one mends it; their tests share the xdist group ``valkey``."""
    _check_group("valkey", request)
    return valkey_servers


@pytest.fixture
def whole_valkey(valkey: ValkeyServers) -> Iterator[ValkeyServers]:
    """The Valkey servers, whole, and made so again afterwards."""
    valkey.wait_until_whole()
    yield valkey
    valkey.start()
    valkey.wait_until_whole()


def _check_group(name: str, request: pytest.FixtureRequest) -> None:
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith(f"@{name}"), "another process may break the cluster under this test"


pytest_plugins = ["reliamq.testing.plugin"]
