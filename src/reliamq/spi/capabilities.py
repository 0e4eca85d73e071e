"""The documented differences between brokers, one flag each.

The core asks a flag and never a backend's name; the conformance kit runs or leaves out a test by it; ``reliamq
backends`` prints it.  What a broker cannot do is so said at the start, by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from reliamq.spi.durability import Durability

__all__ = ["Capabilities"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one backend can do.

    durability: the strongest it can promise; asking for more is refused at the start.
    networked: other machines are involved, so :attr:`Durability.REPLICATED` is the default.
    survives_restart: what was stored is there after every process of the backend was killed.
    shared_between_processes: several processes can publish and consume by one URL.
    deduplicates: an id that is published twice is stored once, within the topic's retention (P4).
    keeps_finished: what every group has finished is kept for the topic's retention, for groups yet to come (C9).
    waits_in_order: ``Retry(keep_order=True)`` keeps the key's order in the broker, for delays of any length (C6).
    """

    durability: Durability
    networked: bool
    survives_restart: bool = True
    shared_between_processes: bool = True
    deduplicates: bool = False
    keeps_finished: bool = True
    waits_in_order: bool = True
