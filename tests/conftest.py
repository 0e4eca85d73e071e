"""What every test may use."""

from collections.abc import Iterator

import pytest

from tests.servers.kafka import KafkaCluster, kafka_cluster
from tests.servers.postgresql import PostgresqlServer, run_postgresql
from tests.servers.rabbitmq import RabbitmqCluster, rabbitmq_cluster


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
def rabbitmq(rabbitmq_servers: RabbitmqCluster, request: pytest.FixtureRequest) -> RabbitmqCluster:
    """The three-node cluster.  A test that breaks it mends it; its tests share the xdist group ``rabbitmq``."""
    _check_group("rabbitmq", request)
    return rabbitmq_servers


@pytest.fixture
def whole_rabbitmq(rabbitmq: RabbitmqCluster) -> Iterator[RabbitmqCluster]:
    """The cluster, whole, and made so again afterwards."""
    rabbitmq.wait_until_whole()
    yield rabbitmq
    rabbitmq.start()
    rabbitmq.wait_until_whole()


def _check_group(name: str, request: pytest.FixtureRequest) -> None:
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith(f"@{name}"), "another process may break the cluster under this test"


pytest_plugins = ["reliamq.testing.plugin"]
