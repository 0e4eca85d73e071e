"""A backlog on Kafka: how fast it is published and consumed, and whether the worker's memory grows with it.

    python -m benchmarks.kafka_backlog [MESSAGES]

The memory is that of a process which only consumes, at the first tenth and at the end.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import resource
import sys
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from tests.servers.kafka import KafkaCluster, kafka_cluster

from benchmarks import ours

PARTITIONS = 6
SAFE_TOPIC = {"min.insync.replicas": "2", "unclean.leader.election.enable": "false", "retention.ms": "-1"}


def url_of(cluster: KafkaCluster) -> str:
    """With which reliamq's topics are like everybody's."""
    return f"{cluster.url}?partitions={PARTITIONS}"


@asynccontextmanager
async def fresh_topics(cluster: KafkaCluster, *contestants: str) -> AsyncIterator[list[str]]:
    """One each, gone at the end.  reliamq's is as all of them; only its group has to be declared besides."""
    names = [f"bench-{one}-{uuid.uuid4().hex[:8]}" for one in contestants]
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.addresses)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, PARTITIONS, 3, topic_configs=SAFE_TOPIC) for name in names])
        await _wait_for_leaders(admin, names)
        yield names
        await admin.delete_topics(names)
    finally:
        await admin.close()


async def _wait_for_leaders(admin: AIOKafkaAdminClient, names: list[str]) -> None:
    while True:
        parts = [part for topic in await admin.describe_topics(names) for part in topic["partitions"]]
        if len(parts) == PARTITIONS * len(names) and all(part["leader"] >= 0 for part in parts):
            return
        await asyncio.sleep(0.1)


def consume_alone(topic: str, messages: int) -> tuple[int, int, float]:
    """MiB at the first tenth and at the end, and the rate; of this process."""
    logging.disable(logging.CRITICAL)
    count, before = 0, 0

    def handled() -> None:
        nonlocal count, before
        count += 1
        if count == messages // 10:
            before = _peak_memory()

    reading = asyncio.run(ours.consume(url_of(kafka_cluster()), topic, messages, handled))
    return before, _peak_memory(), reading.rate


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


async def measure_memory(cluster: KafkaCluster, messages: int) -> None:
    """Publish here, consume in a process that does nothing else."""
    async with fresh_topics(cluster, "memory") as (topic,):
        published = (await ours.publish(url_of(cluster), topic, messages)).rate
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            working = asyncio.wrap_future(pool.submit(consume_alone, topic, messages))
            before, after, consumed = await working
    print(f"{messages:,} messages: published {published:,.0f}/s, consumed {consumed:,.0f}/s;", end=" ")
    print(f"worker's memory {before} → {after} MiB")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(measure_memory(kafka_cluster(), int((*sys.argv[1:], 1_000_000)[0])))
