"""Backends that are broken on purpose, one promise each: how we know that the conformance kit can fail.

Each fault wraps a sound backend and changes one thing.  ``breaks`` are the promises whose tests must fail, all of them
and no others; where one fault cannot but break two, both are named.
"""

from __future__ import annotations

from reliamq.testing.faults import arrival, departure, shelter
from reliamq.testing.faults.fault import (
    Fault,
    PassingDeadLetters,
    PassingPublisher,
    PassingStorage,
    PassingSubscription,
)

__all__ = ["FAULTS", "Fault", "PassingDeadLetters", "PassingPublisher", "PassingStorage", "PassingSubscription"]

FAULTS: dict[str, Fault] = {**departure.FAULTS, **shelter.FAULTS, **arrival.FAULTS}
