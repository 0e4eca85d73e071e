"""reliamq as a contestant: an application with the settings that it has by itself, on whatever broker the URL says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import anyio

from benchmarks.embedded import TEXT, Order, order
from benchmarks.measuring import Clock, Reading, Send, call_side_by_side
from reliamq import Reliamq
from reliamq.settings import Settings
from reliamq.topics import Topic

__all__ = ["consume", "publish", "publishing"]

GROUP = "bench"


def make(url: str, topic: str) -> tuple[Reliamq, Topic[Order]]:
    """The application and its topic."""
    app = Reliamq(Settings(broker=url))
    return app, app.topic(topic, Order, key=lambda order: order.account, groups=[GROUP], retention=timedelta(0))


@asynccontextmanager
async def publishing(url: str, topic: str, text: str = TEXT) -> AsyncIterator[Send]:
    """A model each."""
    app, orders = make(url, topic)

    async def send(number: int) -> None:
        await orders.publish(order(number, text))

    async with app:
        yield send


async def publish(url: str, topic: str, messages: int, text: str = TEXT) -> Reading:
    """A model each."""
    async with publishing(url, topic, text) as send:
        return await call_side_by_side(messages, send)


async def consume(url: str, topic: str, messages: int, handled: Callable[[], None] = lambda: None) -> Reading:
    """Receive, lanes, decode, handler, settle.  handled: called for each."""
    app, orders = make(url, topic)
    clock, stop = Clock(messages), anyio.Event()

    @app.handler(orders, group=GROUP, effects="repeatable")
    async def handle(order: Order) -> None:
        clock.handled()
        handled()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app.run_worker, stop)
        await clock.finished.wait()
        stop.set()
    return clock.reading
