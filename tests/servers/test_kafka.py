"""The test-bed itself: a cluster that can be broken, and a proxy whose faults are real."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from tests.servers.kafka import PASSWORD, USER, KafkaCluster
from tests.servers.proxy import Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("kafka")]


async def brokers(cluster: KafkaCluster) -> dict[int, str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.addresses)
    try:
        await admin.start()
        return {each["node_id"]: each["rack"] for each in (await admin.describe_cluster())["brokers"]}
    finally:
        await admin.close()


async def test_three_brokers_stand_on_three_racks(kafka: KafkaCluster) -> None:
    assert await brokers(kafka) == {1: "rack1", 2: "rack2", 3: "rack3"}


async def test_a_killed_broker_leaves_the_cluster_and_returns(whole: KafkaCluster) -> None:
    whole.brokers[0].kill()
    assert not whole.brokers[0].running

    deadline = time.monotonic() + 30
    seen = {1: ""}
    while 1 in seen:
        assert time.monotonic() < deadline
        with suppress(KafkaError):  # it asked the dead one
            seen = await brokers(whole)
    await asyncio.to_thread(whole.start)

    assert 1 in await brokers(whole)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
async def test_a_client_signs_in_over_tls(kafka: KafkaCluster, mechanism: str) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.secure_addresses,
        security_protocol="SASL_SSL",
        sasl_mechanism=mechanism,
        sasl_plain_username=USER,
        sasl_plain_password=PASSWORD,
        ssl_context=ssl.create_default_context(cafile=str(kafka.certificate_authority)),
    )
    await producer.start()
    await producer.stop()
    await asyncio.sleep(0.3)  # it does not wait for TLS to say goodbye


class TestProxy:
    """Against an echo server."""

    @pytest.fixture
    async def proxy(self) -> AsyncIterator[Proxy]:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while chunk := await reader.read(1000):
                    writer.write(chunk)
            writer.close()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        free = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = free.sockets[0].getsockname()[1]
        free.close()
        with Proxy(port, server.sockets[0].getsockname()[1]) as proxy:
            yield proxy
        server.close()

    async def ask(self, proxy: Proxy, question: bytes = b"hello") -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.listen)
        try:
            writer.write(question)
            async with asyncio.timeout(1):
                return await reader.readexactly(len(question))
        finally:
            writer.transport.abort()

    async def test_it_forwards_and_counts(self, proxy: Proxy) -> None:
        assert await self.ask(proxy) == b"hello"
        assert (proxy.bytes_up, proxy.bytes_down) == (5, 5)

    async def test_a_blackhole_swallows_and_heals(self, proxy: Proxy) -> None:
        proxy.blackhole()
        with pytest.raises(TimeoutError):
            await self.ask(proxy)
        proxy.heal()
        assert await self.ask(proxy) == b"hello"

    async def test_dropping_the_answers_still_delivers_the_questions(self, proxy: Proxy) -> None:
        proxy.drop("down")
        with pytest.raises(TimeoutError):
            await self.ask(proxy)
        assert (proxy.bytes_up, proxy.bytes_down) == (5, 0)

    async def test_an_answer_can_be_cut_in_the_middle(self, proxy: Proxy) -> None:
        proxy.cut_after(3)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await self.ask(proxy)
        assert proxy.bytes_down == 3
        assert await self.ask(proxy) == b"hello"

    async def test_open_connections_are_reset_and_new_ones_accepted(self, proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.listen)
        writer.write(b"x")
        await reader.readexactly(1)
        await asyncio.to_thread(proxy.cut)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.transport.abort()
        assert await self.ask(proxy) == b"hello"

    async def test_refusing_lasts_until_healed(self, proxy: Proxy) -> None:
        await asyncio.to_thread(proxy.refuse)
        with pytest.raises(ConnectionError):
            await self.ask(proxy)
        await asyncio.to_thread(proxy.heal)
        assert await self.ask(proxy) == b"hello"
