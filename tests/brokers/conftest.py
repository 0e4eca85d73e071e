"""Each test here runs on each networked broker."""

from __future__ import annotations

import uuid

import pytest

from tests.brokers.application import Broker
from tests.servers.kafka import KafkaCluster
from tests.servers.rabbitmq import RabbitmqCluster
from tests.servers.redis import RedisServers

SESSION_SECONDS = 6


def on_kafka(cluster: KafkaCluster) -> Broker:
    return Broker(
        "kafka",
        cluster.url,
        "partitions",
        {"session_timeout_seconds": SESSION_SECONDS, "rebalance_timeout_seconds": 10},
    )


def on_rabbitmq(cluster: RabbitmqCluster) -> Broker:
    return Broker("rabbitmq", cluster.url, "lanes")


def on_redis(servers: RedisServers) -> Broker:
    return Broker("redis", servers.url, "lanes")


# Valkey has its turn in the long forms: nothing here comes to what it does otherwise than Redis
ON = {"kafka": on_kafka, "rabbitmq": on_rabbitmq, "redis": on_redis}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ON])
def broker(request: pytest.FixtureRequest) -> Broker:
    return ON[request.param](request.getfixturevalue(request.param))


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4()}"
