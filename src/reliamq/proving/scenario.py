"""The business whose messages are counted: orders that change the balances of accounts.

An application writes an order row and an outbox row in one transaction; a worker writes an effect row and the balance
in one.  The effect rows have no unique constraint, so that a doubled effect is visible.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import BigInteger, Double, Integer, String, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from reliamq.app import Reliamq
from reliamq.database import now_seconds
from reliamq.handlers import Backoff
from reliamq.proving.plan import Plan
from reliamq.settings import RelaySettings, WorkerSettings, load_settings
from reliamq.spi import Backend, Delivery
from reliamq.topics import Topic

__all__ = [
    "Account",
    "Effect",
    "Order",
    "OrderRow",
    "Tables",
    "account_of",
    "make_app",
    "order_topic",
    "orders_of",
    "place",
    "record_effect",
]

GROUP = "accounting"
MAX_ACCOUNT_CHARACTERS = 200
ROLLED_BACK_EVERY = 20


class Order(BaseModel):
    """number: its place in the account's own order of commits.  body: the user's own, with ``--input``."""

    order: int
    account: str
    amount: int
    number: int
    body: dict[str, Any] | None = None


class Tables(DeclarativeBase):
    """The business's tables."""


class OrderRow(Tables):
    """A committed order and the id of its message."""

    __tablename__ = "prove_orders"
    order: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    message_id: Mapped[str] = mapped_column(String(64))
    account: Mapped[str] = mapped_column(String(MAX_ACCOUNT_CHARACTERS))
    number: Mapped[int] = mapped_column(Integer)
    amount: Mapped[int] = mapped_column(Integer)
    committed_at: Mapped[float] = mapped_column(Double, default=now_seconds())


class Account(Tables):
    """numbers: orders placed on it.  balance: what their effects add up to."""

    __tablename__ = "prove_accounts"
    name: Mapped[str] = mapped_column(String(MAX_ACCOUNT_CHARACTERS), primary_key=True)
    numbers: Mapped[int] = mapped_column(Integer, default=0)
    balance: Mapped[int] = mapped_column(BigInteger, default=0)


class Effect(Tables):
    """One effect; doubled ones are two rows."""

    __tablename__ = "prove_effects"
    place: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    message_id: Mapped[str] = mapped_column(String(64))
    account: Mapped[str] = mapped_column(String(MAX_ACCOUNT_CHARACTERS))
    number: Mapped[int] = mapped_column(Integer)
    amount: Mapped[int] = mapped_column(Integer)
    applied_at: Mapped[float] = mapped_column(Double, default=now_seconds())


async def reset_tables(engine: AsyncEngine, plan: Plan) -> None:
    """Begin with empty tables and all accounts."""
    async with engine.begin() as connection:
        await connection.run_sync(Tables.metadata.drop_all)
        await connection.run_sync(Tables.metadata.create_all)
        names = sorted({account for _, account, _ in _numbered(plan)})
        await connection.execute(insert(Account), [{"name": name, "numbers": 0, "balance": 0} for name in names])


# --- the application's side -------------------------------------------------------------------------------------------


def orders_of(plan: Plan, application: int) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """The orders that one application places: number, account, the user's own body."""
    for order, account, body in _numbered(plan):
        if order % plan.applications == application:
            yield order, account, body


def is_rolled_back(order: int) -> bool:
    """One order in twenty is rolled back on purpose: nothing of it may ever be seen."""
    return order % ROLLED_BACK_EVERY == ROLLED_BACK_EVERY - 1


def place(session: Session, order: int, account: str, body: dict[str, Any] | None) -> Order:
    """Write the order row; its number is drawn under the account's row lock, so numbers are in commit order."""
    session.execute(update(Account).where(Account.name == account).values(numbers=Account.numbers + 1))
    number = session.scalars(select(Account.numbers).where(Account.name == account)).one()
    return Order(order=order, account=account, amount=order % 97 + 1, number=number, body=body)


def account_of(order: int, body: dict[str, Any], keys: int) -> str:
    """Whose order a body of the user's own is: what it says under *key* or *account*, or one of ``keys`` in turn."""
    return str(body.get("key", body.get("account", order % keys)))


def _numbered(plan: Plan) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    if plan.bodies is not None:
        with Path(plan.bodies).open("rb") as lines:
            for order, line in enumerate(lines):
                body = json.loads(line)
                yield order, account_of(order, body, plan.keys), body
        return
    accounts = random.Random(plan.seed)  # noqa: S311  # repeatable, not secret
    for order in range(plan.messages):
        yield order, f"account-{accounts.randrange(plan.keys)}", None


# --- the worker's side ------------------------------------------------------------------------------------------------


def record_effect(session: Session, order: Order, delivery: Delivery) -> None:
    """The effect: one row, and the account's balance."""
    session.execute(
        insert(Effect).values(
            message_id=delivery.message.id, account=order.account, number=order.number, amount=order.amount
        )
    )
    session.execute(update(Account).where(Account.name == order.account).values(balance=Account.balance + order.amount))


def make_app(plan: Plan, backend: Backend | None = None) -> tuple[Reliamq, Topic[Order]]:
    """The application with its topic; handlers are added by the worker, because a broken rule may change them."""
    lease = timedelta(seconds=plan.lease_seconds)
    settings = load_settings(
        broker=plan.broker,
        database=plan.database,
        worker=WorkerSettings(lease=lease, prefetch=200, stop_deadline=timedelta(seconds=10)),
        relay=RelaySettings(lease=lease, poll=timedelta(milliseconds=20), batch=200),
    )
    app = Reliamq(settings, backend=backend)
    topic = order_topic(plan.topic)
    app.include(topic)
    return app, topic


def order_topic(name: str) -> Topic[Order]:
    """The topic, of no application yet."""
    return Topic(name, Order, key=lambda order: order.account, groups=[GROUP])


RETRY = Backoff(attempts=50, first=timedelta(milliseconds=50), ceiling=timedelta(seconds=1))
