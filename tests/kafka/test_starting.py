"""An application does not start on a topic that can lose its messages, and the audit says so too (S2 S3)."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import anyio
import pytest
from aiokafka.admin import NewTopic

from reliamq import DurabilityError, Reliamq
from reliamq.settings import Settings
from reliamq.spi import Durability
from reliamq_kafka.settings import KafkaSettings
from reliamq_kafka.wire.admin import open_admin
from tests.brokers.application import Order
from tests.cli import RELIAMQ
from tests.kafka.test_audit import commit, write
from tests.servers.kafka import KafkaCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]

SOUND = {"retention.ms": "-1", "message.timestamp.type": "LogAppendTime", "max.message.bytes": "1100000"}
UNSAFE = [
    pytest.param({}, 1, "replicas", "kafka-reassign-partitions.sh", id="one replica"),
    pytest.param({"min.insync.replicas": "1"}, 3, "min.insync.replicas", "min.insync.replicas=2", id="one in sync"),
    pytest.param(
        {"unclean.leader.election.enable": "true"},
        3,
        "unclean.leader.election.enable",
        "unclean.leader.election.enable=false",
        id="unclean election",
    ),
    pytest.param(
        {"retention.ms": "60000", "message.timestamp.type": "CreateTime"},
        3,
        "group behind",
        "retention.ms=-1",
        id="retention shorter than the lag",
    ),
]


def app_on(kafka: KafkaCluster, topic: str) -> Reliamq:
    app = Reliamq(Settings(broker=f"{kafka.url}?partitions=3", durability=Durability.REPLICATED))
    app.topic(topic, Order, key=lambda order: order.account)
    return app


async def unsafe_topic(settings: KafkaSettings, replicas: int, configs: dict[str, str]) -> str:
    topic = f"starting-{uuid.uuid4()}"
    async with open_admin(settings) as admin:
        await admin.create(NewTopic(topic, 3, replicas, topic_configs={**SOUND, **configs}))
        await admin.led_partitions(topic)
    if "retention.ms" in configs:
        await commit(settings, topic, "behind", 0, range(3))
        await write(settings, topic, 3, age=45)
    return topic


@pytest.mark.parametrize(("configs", "replicas", "setting", "fix"), UNSAFE)
async def test_an_application_does_not_start_on_an_unsafe_topic_and_says_what_to_do(
    kafka: KafkaCluster, settings: KafkaSettings, configs: dict[str, str], replicas: int, setting: str, fix: str
) -> None:
    """S3"""
    topic = await unsafe_topic(settings, replicas, configs)

    with pytest.raises(DurabilityError) as refused:
        async with app_on(kafka, topic):
            pass

    assert setting in str(refused.value)
    assert fix in str(refused.value)


async def test_it_starts_on_a_topic_that_it_made_itself(kafka: KafkaCluster) -> None:
    async with app_on(kafka, f"starting-{uuid.uuid4()}"):
        pass


async def test_the_audit_of_an_unsafe_topic_ends_with_1_and_names_it(
    kafka: KafkaCluster, settings: KafkaSettings, tmp_path: Path
) -> None:
    """S2"""
    topic = await unsafe_topic(settings, 3, {"min.insync.replicas": "1"})
    (tmp_path / "service.py").write_text(
        "from pydantic import BaseModel\nfrom reliamq import Reliamq\n"
        f"class Order(BaseModel):\n    number: int\napp = Reliamq()\napp.topic({topic!r}, Order)\n"
    )
    done = await anyio.run_process(
        [*RELIAMQ, "audit", "service:app", "--json"],
        cwd=tmp_path,
        env={**os.environ, "RELIAMQ_BROKER": kafka.url},
        check=False,
    )

    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)
    assert [one["setting"] for one in findings if topic in one["subject"]] == ["min.insync.replicas"]
