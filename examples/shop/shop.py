"""A shop: an order is placed in one transaction; the accounts are charged once, and a parcel is packed.

    reliamq run shop:app --workers 2    handles
    reliamq relay shop:app              sends what was placed
    python place.py 100                 places orders

Which broker carries it is one line of ``reliamq.toml``.
"""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel
from sqlalchemy import ForeignKey
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from reliamq import Backoff, Reliamq, outbox


class Base(DeclarativeBase):
    """The shop's tables."""


class Order(Base):
    __tablename__ = "orders"

    number: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    amount: Mapped[int]


class Charge(Base):
    __tablename__ = "charges"

    number: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[int] = mapped_column(ForeignKey("orders.number"))
    customer: Mapped[str]
    amount: Mapped[int]


class Parcel(Base):
    __tablename__ = "parcels"

    number: Mapped[int] = mapped_column(primary_key=True)
    order: Mapped[int]


class OrderPlaced(BaseModel):
    """What the rest of the shop hears."""

    number: int
    customer: str
    amount: int


app = Reliamq()
orders = app.topic("shop-orders", OrderPlaced, key=lambda order: order.customer)


async def place(session: AsyncSession, order: OrderPlaced) -> None:
    """The order and its message: one transaction, both or neither."""
    session.add(Order(number=order.number, customer=order.customer, amount=order.amount))
    outbox.add(session, orders, order)


@app.handler(orders, group="accounting", effects="transaction")
async def charge(order: OrderPlaced, session: AsyncSession) -> None:
    """Commits with the message's id: however often it is delivered, it is charged once."""
    session.add(Charge(order=order.number, customer=order.customer, amount=order.amount))


@app.handler(orders, group="warehouse", effects="transaction", retry=Backoff(attempts=5, first=timedelta(seconds=0.1)))
async def pack(order: OrderPlaced, session: AsyncSession) -> None:
    """The other group has every order too, and its own pace."""
    session.add(Parcel(order=order.number))
