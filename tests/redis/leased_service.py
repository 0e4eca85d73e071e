"""An application whose effects are under leases, and which writes down what it does.

Run in worker processes as ``tests.redis.leased_service:app``; the environment says where.
"""

from __future__ import annotations

import asyncio
import os

from pydantic import BaseModel

from reliamq import FencingToken, Reliamq

SECONDS = 3.0


class Parcel(BaseModel):
    number: int


app = Reliamq()
parcels = app.topic(os.environ.get("SERVICE_TOPIC", "parcels"), Parcel)


@app.handler(parcels, group="g", effects="lease")
async def send(parcel: Parcel, token: FencingToken) -> None:
    """Take longer than a lease, in a way that a process cannot do while it is stopped."""
    note("started", token)
    for _ in range(30):
        await asyncio.sleep(SECONDS / 30)
    note("sent", token)


def note(what: str, token: FencingToken) -> None:
    """Append a line that survives the process."""
    with open(f"{os.environ['SERVICE_FOLDER']}/notes", "a") as file:
        file.write(f"{what} {token.value} {os.getpid()}\n")
