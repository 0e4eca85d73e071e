"""RabbitMQ, three nodes, keeps every promise."""

import pytest

from reliamq.backends import open_backend
from reliamq.testing.conformance import *  # noqa: F403  # the kit's tests
from reliamq.testing.harness import MakeBackend
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = pytest.mark.xdist_group("rabbitmq")


@pytest.fixture
def make_backend(rabbitmq: RabbitmqCluster) -> MakeBackend:
    return lambda: open_backend(rabbitmq.url, {"rabbitmq": {"lanes": 4}})
