"""The application of the outbox's long forms: one topic, and ``reliamq relay`` runs on it."""

from __future__ import annotations

import os

from pydantic import BaseModel

from reliamq import Reliamq


class Order(BaseModel):
    """number: grows within the account."""

    account: str
    number: int
    text: str = "x" * 150


app = Reliamq()
orders = app.topic(os.environ.get("RELAYED_TOPIC", "orders"), Order, key=lambda order: order.account, groups=["g"])
