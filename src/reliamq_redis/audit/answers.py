"""What servers tell of themselves, as far as an audit asks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reliamq_redis.wire.servers import Address

__all__ = ["EntryId", "Replica", "Server", "after", "before", "entry_id", "name_of", "pairs_of", "shown_id"]

EntryId = tuple[int, int]
"""Milliseconds and a number: what Redis orders entries by."""
LAST_NUMBER = 2**64 - 1
WITH_WAITAOF = (7, 2)
"""Since that version (Redis documentation, WAITAOF); Valkey tells 7.2 as the version that it is like."""


@dataclass(frozen=True, slots=True)
class Replica:
    """As its primary sees it.  lag_seconds: since it was last heard of."""

    address: Address
    state: str
    lag_seconds: int

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Replica:
        """Raises KeyError for something else than a replica."""
        return cls((str(told["ip"]), int(told["port"])), str(told["state"]), int(told.get("lag", 0)))


@dataclass(frozen=True, slots=True)
class Server:
    """info: of ``INFO``.  config: of ``CONFIG GET``, as far as it was told.  knows_waitaof: None where it was not told.

    refused: what was said instead of an answer, by command.
    """

    address: Address
    info: Mapping[str, Any]
    config: Mapping[str, str]
    knows_waitaof: bool | None
    refused: Mapping[str, str]

    @property
    def name(self) -> str:
        """``host:port``."""
        return name_of(self.address)

    def told(self, setting: str) -> str | None:
        """A setting, or a field of ``INFO``, where one tells what the setting does; None where neither does."""
        if setting in self.config:
            return self.config[setting]
        if setting == "appendonly" and "aof_enabled" in self.info:
            return "yes" if self.info["aof_enabled"] else "no"
        found = self.info.get(setting.replace("-", "_"))
        return None if found is None else str(found)

    def number(self, setting: str) -> int | None:
        """The same as a number."""
        told = self.told(setting)
        return int(told) if told is not None and re.fullmatch(r"-?\d+", told) else None

    @property
    def role(self) -> str | None:
        """``master`` or ``slave``, as Redis calls them."""
        return self.told("role")

    @property
    def version(self) -> tuple[int, ...] | None:
        """Of Redis, or of the Redis that it is like."""
        found = re.match(r"\d+(\.\d+)*", str(self.info.get("redis_version", "")))
        return tuple(int(part) for part in found[0].split(".")) if found else None

    @property
    def waits_for_disk(self) -> bool:
        """Whether confirmations wait for disks (``WAITAOF``)."""
        if self.knows_waitaof is not None:
            return self.knows_waitaof
        return self.version is not None and self.version >= WITH_WAITAOF

    @property
    def replicas(self) -> list[Replica]:
        """That are connected."""
        told = [value for field, value in self.info.items() if re.fullmatch(r"slave\d+", field)]
        return [Replica.read(one) for one in told]


def name_of(address: Address) -> str:
    """``host:port``."""
    return f"{address[0]}:{address[1]}"


def entry_id(text: bytes | str) -> EntryId:
    """Read an entry's id."""
    time, _, number = (text.decode() if isinstance(text, bytes) else text).partition("-")
    return int(time), int(number or 0)


def shown_id(one: EntryId) -> str:
    """As Redis writes it."""
    return f"{one[0]}-{one[1]}"


def after(one: EntryId) -> EntryId:
    """The id that follows at once."""
    return (one[0], one[1] + 1) if one[1] < LAST_NUMBER else (one[0] + 1, 0)


def before(one: EntryId) -> EntryId:
    """The id that is followed by that one at once."""
    return (one[0], one[1] - 1) if one[1] else (one[0] - 1, LAST_NUMBER)


def pairs_of(answer: Any) -> dict[str, Any]:
    """Names and values in turn, or a mapping: in both ways the protocol's versions tell them."""
    pairs = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
    return {name.decode() if isinstance(name, bytes) else str(name): value for name, value in pairs}
