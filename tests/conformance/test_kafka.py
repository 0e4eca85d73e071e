"""Kafka, three brokers on three racks, keeps every promise."""

import pytest

from reliamq.backends import open_backend
from reliamq.testing.conformance import *  # noqa: F403  # the kit's tests
from reliamq.testing.harness import MakeBackend
from tests.servers.kafka import KafkaCluster

pytestmark = pytest.mark.xdist_group("kafka")


@pytest.fixture
def make_backend(kafka: KafkaCluster) -> MakeBackend:
    return lambda: open_backend(kafka.url, {"kafka": {"partitions": 4}})
