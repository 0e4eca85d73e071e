"""The test-bed itself: a cluster of RabbitMQ nodes that can be broken, one by one and all at once."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.error import HTTPError

import psutil
import pytest
from aio_pika import Message, connect
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError

from tests.servers.cluster import answers
from tests.servers.process import ServerProcess, wait_until
from tests.servers.proxy import Proxy
from tests.servers.rabbitmq import RabbitmqCluster

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("rabbitmq")]

AS_NOBODY = ["/usr/bin/setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


def running(cluster: RabbitmqCluster) -> set[str]:
    return {node["name"] for node in cluster.call("nodes") if node["running"]}


def is_alarmed(cluster: RabbitmqCluster) -> bool:
    try:
        cluster.call("health/checks/alarms")
    except HTTPError:
        return True
    return False


async def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


@asynccontextmanager
async def connected(cluster: RabbitmqCluster, node: int = 0) -> AsyncIterator[AbstractConnection]:
    connection = await connect(f"amqp://guest:guest@{cluster.addresses[node]}/", timeout=5)
    async with connection:
        yield connection


async def declare(channel: AbstractChannel, name: str, members: int = 3) -> AbstractQueue:
    return await channel.declare_queue(
        name, durable=True, arguments={"x-queue-type": "quorum", "x-quorum-initial-group-size": members}
    )


async def declare_with_messages(cluster: RabbitmqCluster, count: int) -> str:
    """A quorum queue and its confirmed messages."""
    name = f"test-{uuid.uuid4()}"
    async with connected(cluster) as connection:
        channel = await connection.channel()
        await declare(channel, name)
        for _ in range(count):
            await channel.default_exchange.publish(Message(b"x"), name)
    return name


async def delete(cluster: RabbitmqCluster, name: str) -> int:
    """How many messages it had."""
    async with connected(cluster) as connection:
        queue = await declare(await connection.channel(), name)
        await queue.delete(if_unused=False, if_empty=False)
    return queue.declaration_result.message_count or 0


async def test_three_nodes_run(rabbitmq: RabbitmqCluster) -> None:
    assert running(rabbitmq) == {"rq1@localhost", "rq2@localhost", "rq3@localhost"}


async def test_a_killed_node_leaves_the_cluster_and_returns(whole_rabbitmq: RabbitmqCluster) -> None:
    node = whole_rabbitmq.nodes[0]
    assert psutil.Process(int((node.folder / "pid").read_text())).name() == "beam.smp"  # not a shell that waits for it
    node.kill()
    assert not node.running

    await eventually(lambda: "rq1@localhost" not in running(whole_rabbitmq))
    await asyncio.to_thread(whole_rabbitmq.start)

    assert "rq1@localhost" in running(whole_rabbitmq)


async def test_a_killed_node_is_waited_for_until_it_has_its_queues_again(whole_rabbitmq: RabbitmqCluster) -> None:
    name = await declare_with_messages(whole_rabbitmq, 1)
    whole_rabbitmq.nodes[0].kill()
    assert ("/", name) in whole_rabbitmq.critical_queues()

    whole_rabbitmq.nodes[0].start()
    await asyncio.to_thread(whole_rabbitmq.wait_until_whole)

    assert ("/", name) not in whole_rabbitmq.critical_queues()
    assert await delete(whole_rabbitmq, name) == 1


async def test_a_queue_that_is_made_for_one_node_is_not_waited_for(rabbitmq: RabbitmqCluster) -> None:
    async with connected(rabbitmq) as connection:
        queue = await declare(await connection.channel(), f"test-{uuid.uuid4()}", members=1)
        await asyncio.to_thread(rabbitmq.wait_until_whole)
        await queue.delete(if_unused=False, if_empty=False)


async def test_a_paused_node_answers_nothing_until_it_is_resumed(whole_rabbitmq: RabbitmqCluster) -> None:
    whole_rabbitmq.nodes[0].pause()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2), connected(whole_rabbitmq):
            pass
    assert whole_rabbitmq.nodes[0].running
    whole_rabbitmq.nodes[0].resume()

    async with connected(whole_rabbitmq):
        pass
    await asyncio.to_thread(whole_rabbitmq.wait_until_whole)


async def test_what_was_confirmed_is_there_after_all_three_were_killed(whole_rabbitmq: RabbitmqCluster) -> None:
    name = await declare_with_messages(whole_rabbitmq, 20)
    for node in whole_rabbitmq.nodes:
        node.kill()
    await asyncio.to_thread(whole_rabbitmq.start)
    await asyncio.to_thread(whole_rabbitmq.wait_until_whole)

    assert await delete(whole_rabbitmq, name) == 20


async def test_a_client_signs_in_over_tls(rabbitmq: RabbitmqCluster) -> None:
    url = rabbitmq.secure_url.replace("rabbitmqs://", "amqps://").partition(",")[0]
    context = ssl.create_default_context(cafile=str(rabbitmq.certificate_authority))
    connection = await connect(f"{url}/", ssl_context=context)
    await connection.close()


async def test_the_proxy_cuts_a_client_off(rabbitmq: RabbitmqCluster) -> None:
    ports = rabbitmq.ports[0]
    with Proxy(ports.proxied, ports.plain) as proxy:
        connection = await connect(f"amqp://guest:guest@127.0.0.1:{ports.proxied}/")
        channel = await connection.channel()
        await asyncio.to_thread(proxy.cut)
        # The last one where the client has seen the cut before it asks
        with pytest.raises((AMQPError, ConnectionError, ChannelInvalidStateError)):
            await declare(channel, "of nobody")
        await connection.close()
        assert proxy.bytes_up
        assert proxy.bytes_down


async def test_a_node_short_of_memory_raises_its_alarm(whole_rabbitmq: RabbitmqCluster) -> None:
    node = whole_rabbitmq.nodes[0]
    try:
        whole_rabbitmq.control(node, "set_vm_memory_high_watermark", "absolute", "1MB")
        await eventually(lambda: is_alarmed(whole_rabbitmq))
    finally:
        whole_rabbitmq.control(node, "set_vm_memory_high_watermark", "absolute", "2GB")
    await eventually(lambda: not is_alarmed(whole_rabbitmq))


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests ran as a plain user")
def test_a_plain_user_can_run_a_node() -> None:
    folder = Path(tempfile.mkdtemp(prefix="reliamq-rabbitmq-"))  # pytest's own folders are closed to others
    RabbitmqCluster.prepare(folder)
    cluster = RabbitmqCluster.of(folder)
    subprocess.run(["/bin/chown", "-R", "-h", "nobody:nogroup", str(folder)], check=True)  # not what links lead to
    node = as_nobody(cluster.nodes[0])
    try:
        node.start()
        wait_until(lambda: answers(cluster.ports[0].plain), 60, [node])
        assert psutil.Process(int((node.folder / "pid").read_text())).username() == "nobody"
    finally:
        node.kill()
        cluster.stop()
        shutil.rmtree(folder)


def as_nobody(node: ServerProcess) -> ServerProcess:
    return ServerProcess(node.name, node.folder, [*AS_NOBODY, *node.command], node.environment)
