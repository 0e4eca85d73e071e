"""An application whose handlers do what their messages say, and write down what they did.

Run by ``reliamq run tests.brokers.service:app`` in worker processes; the environment says where.
"""

from __future__ import annotations

import asyncio
import os

from pydantic import BaseModel

from reliamq import Backoff, Reliamq

FOLDER = os.environ.get("SERVICE_FOLDER", ".")
HURRY = "SERVICE_HURRY" in os.environ


class Job(BaseModel):
    """seconds: how long it takes.  deadly: it kills its process."""

    number: int
    account: str
    seconds: float = 0.0
    deadly: bool = False


app = Reliamq()
jobs = app.topic(os.environ.get("SERVICE_TOPIC", "jobs"), Job, key=lambda job: job.account)


def note(kind: str, number: int) -> None:
    """Append a line that survives the process."""
    with open(f"{FOLDER}/{kind}", "a") as file:
        file.write(f"{number}\n")


@app.handler(jobs, group="g", effects="repeatable", concurrency=8, retry=Backoff(attempts=3))
async def work(job: Job) -> None:
    """Take the time that it takes."""
    note("started", job.number)
    if job.deadly:
        os._exit(1)
    await asyncio.sleep(0 if HURRY else job.seconds)
    note("done", job.number)
