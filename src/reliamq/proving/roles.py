"""What the prover's processes do: an application, a relay, a worker.  Each can be killed at any moment and started
again.

They come from a fork server that has imported everything, so that a restart takes milliseconds.  When the prover itself
dies, they die.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

import anyio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from reliamq import outbox
from reliamq.app import Reliamq
from reliamq.backends import open_backend
from reliamq.database import open_engine, open_sync_engine
from reliamq.proving.breaks import ForgetfulOutbox, WatchedBackend
from reliamq.proving.ledger import Ledger
from reliamq.proving.plan import Plan, Rule
from reliamq.proving.scenario import (
    GROUP,
    RETRY,
    Order,
    OrderRow,
    is_rolled_back,
    make_app,
    orders_of,
    place,
    record_effect,
)
from reliamq.spi import Delivery, Unconfirmed
from reliamq.topics import Topic, new_message_id

__all__ = ["run_role"]

UNSENT_AT_MOST = 10


def run_role(role: str, index: int, plan_json: str, log: str) -> None:
    """The entry point of a process.  log: the file for what it has to say."""
    _die_with_prover()
    os.setpgid(0, 0)  # a Ctrl-C in the terminal is the prover's business
    stream = open(log, "a", buffering=1)  # noqa: SIM115  # for the life of the process
    sys.stdout = sys.stderr = stream
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(asctime)s %(message)s")
    plan = Plan.from_json(plan_json)
    ledger = Ledger(plan.ledger_folder, f"{role}-{index}")
    anyio.run(_main, role, index, plan, ledger)


def _die_with_prover() -> None:
    """The fork server lives as long as we do, so its death tells nothing: watch the prover itself."""
    prover = multiprocessing.parent_process()

    def watch() -> None:
        if prover is not None:
            prover.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="prover watch", daemon=True).start()


async def _main(role: str, index: int, plan: Plan, ledger: Ledger) -> None:
    backend = WatchedBackend(open_backend(plan.broker), ledger, plan.broken)
    app, topic = make_app(plan, backend)
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stop_on_signal, stop)
        if role == "application":
            await _apply(app, topic, index, plan, ledger)
        elif role == "relay":
            await _relay(app, plan, stop)
        else:
            await _work(app, topic, index, plan, stop)
        tasks.cancel_scope.cancel()


async def _stop_on_signal(stop: anyio.Event) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            stop.set()


# --- application ------------------------------------------------------------------------------------------------------


async def _apply(app: Reliamq, topic: Topic[Order], index: int, plan: Plan, ledger: Ledger) -> None:
    """Place the orders of one application that are not there yet, one at a time, so blocking the loop is fine."""
    async with app:
        with open_sync_engine(plan.database) as engine:
            with Session(engine) as session:
                there = set(session.scalars(select(OrderRow.order)))
            unsent: list[tuple[str, Order]] = []
            for order, account, body in orders_of(plan, index):
                if order in there:
                    continue
                with Session(engine) as session:
                    placed = _place(session, topic, plan, (order, account, body))
                if placed is None:
                    ledger.write("rolled_back", [str(order)])
                    continue
                ledger.write("committed", [placed[0]])
                if plan.broken is Rule.COMMIT_THEN_SEND:
                    unsent.append(placed)
                    if len(unsent) >= UNSENT_AT_MOST:
                        await _send_late(topic, unsent)
            await _send_late(topic, unsent)


def _place(
    session: Session, topic: Topic[Order], plan: Plan, chosen: tuple[int, str, dict[str, Any] | None]
) -> tuple[str, Order] | None:
    """One transaction; None when it was rolled back on purpose."""
    number, account, body = chosen
    order = place(session, number, account, body)
    message_id = new_message_id()
    if plan.broken is not Rule.COMMIT_THEN_SEND:
        outbox.add(session, topic, order, id=message_id)
    session.add(
        OrderRow(order=number, message_id=message_id, account=account, number=order.number, amount=order.amount)
    )
    session.flush()
    if is_rolled_back(number):
        session.rollback()
        return None
    session.commit()
    return message_id, order


async def _send_late(topic: Topic[Order], unsent: list[tuple[str, Order]]) -> None:
    """The broken rule *commit-then-send*: what is in this list when the process dies is lost."""
    while unsent:
        message_id, order = unsent[0]
        try:
            await topic.publish(order, id=message_id)
        except Unconfirmed:
            continue
        unsent.pop(0)


# --- relay and worker -------------------------------------------------------------------------------------------------


async def _relay(app: Reliamq, plan: Plan, stop: anyio.Event) -> None:
    if plan.broken is not Rule.FORGET_CONFIRM:
        await app.run_relay(stop)
        return
    async with app.outbox_store() as store:
        await app.run_relay(stop, store=ForgetfulOutbox(store))


async def _work(app: Reliamq, topic: Topic[Order], index: int, plan: Plan, stop: anyio.Event) -> None:
    """Both kinds of handler are proven: every other worker has a coroutine."""
    if plan.broken is Rule.NO_IDEMPOTENCY:
        await _work_without_idempotency(app, topic, plan, stop)
        return
    handler = app.handler(topic, group=GROUP, effects="transaction", concurrency=8, retry=RETRY, name="apply")
    handler(_apply_on_the_loop if index % 2 else _apply_in_a_thread)
    await app.run_worker(stop)


def _apply_in_a_thread(order: Order, session: Session, delivery: Delivery) -> None:
    record_effect(session, order, delivery)


async def _apply_on_the_loop(order: Order, session: AsyncSession, delivery: Delivery) -> None:
    await session.run_sync(record_effect, order, delivery)


async def _work_without_idempotency(app: Reliamq, topic: Topic[Order], plan: Plan, stop: anyio.Event) -> None:
    async with open_engine(plan.database) as engine:

        @app.handler(topic, group=GROUP, effects="repeatable", concurrency=8, retry=RETRY)
        async def apply_again(order: Order, delivery: Delivery) -> None:
            async with AsyncSession(engine) as session, session.begin():
                await session.run_sync(record_effect, order, delivery)

        await app.run_worker(stop)
