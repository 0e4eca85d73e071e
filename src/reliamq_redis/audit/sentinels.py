"""Whether the Sentinels can bring about a failover, and agree on who is the primary: what each tells, and what it
means.

Source: Redis documentation, "High availability with Redis Sentinel".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from reliamq.spi import Finding, Severity
from reliamq_redis.audit.answers import name_of, pairs_of
from reliamq_redis.audit.commands import Commands
from reliamq_redis.audit.questions import Questions, sentinel_settings, unseen
from reliamq_redis.audit.rules import Fault, findings_of
from reliamq_redis.settings import RedisSettings
from reliamq_redis.wire.errors import FAILURES, said
from reliamq_redis.wire.servers import Address, Servers

__all__ = ["Sentinels", "ask_sentinels", "sentinel_faults"]

LEAST = 3
"""Two of them agree when a third is away."""


@dataclass(frozen=True, slots=True)
class Told:
    """By one Sentinel.

    primary: what it tells of it; None where it does not know the name.  replicas: all that it has ever seen.
    quorum: why no failover can come about, or empty.
    """

    address: Address
    primary: Mapping[str, str] | None
    replicas: frozenset[Address] = frozenset()
    no_quorum: str = ""


@dataclass(slots=True)
class Sentinels:
    """told: by those that answered.  silent: why the others did not, by name.  unseen: what was refused."""

    told: list[Told] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    unseen: list[Finding] = field(default_factory=list)

    @property
    def replicas(self) -> frozenset[Address]:
        """That any of them knows."""
        return frozenset().union(*(one.replicas for one in self.told))

    def findings(self, settings: RedisSettings, primary: Address) -> Iterator[Finding]:
        """primary: who holds the data."""
        faults = [(name_of(one.address), fault) for one in self.told for fault in sentinel_faults(one, primary)]
        for name, reason in self.silent.items():
            why = "One fewer that can find out that the primary is gone, and tell who it is then."
            fix, found = "Start it, or let this client reach it and sign in.", f"none ({reason})"
            faults.append((name, Fault(Severity.RISKS, "answer", found, "one", why, fix)))
        yield from findings_of("sentinel", faults)
        yield from self.unseen
        if len(settings.servers) < LEAST:
            why = "When those that the URL names are away, the primary is not found, whatever the others know."
            found, fix = str(len(settings.servers)), "Name them all in the URL."
            required = f"at least {LEAST}"
            yield Finding(Severity.NOTE, "this client", "sentinels in the URL", found, required, why, fix)


async def ask_sentinels(settings: RedisSettings) -> Sentinels:
    """What each of them tells; one that does not answer is no error."""
    found, like_servers = Sentinels(), sentinel_settings(settings)
    servers = Servers(like_servers)
    try:
        for address in map(_address, settings.servers):
            questions = Questions(servers, like_servers)
            try:
                found.told += await _ask(questions, address, settings.primary or "")
            except FAILURES as error:
                found.silent[name_of(address)] = said(error)
            found.unseen += unseen(f"sentinel {name_of(address)}", questions, address, Commands(like_servers))
    finally:
        await servers.close()
    return found


def _address(server: str) -> Address:
    host, _, port = server.rpartition(":")
    return host.strip("[]"), int(port)


async def _ask(questions: Questions, address: Address, name: str) -> Sequence[Told]:
    """None where it may not be asked."""
    primary = await questions.of_server(address, "SENTINEL", "MASTER", name)
    if primary is None:
        return [Told(address, None)] if "No such master" in questions.refused.pop("SENTINEL MASTER", "") else []
    replicas = await questions.of_server(address, "SENTINEL", "REPLICAS", name)
    await questions.of_server(address, "SENTINEL", "CKQUORUM", name)
    no_quorum = questions.refused.get("SENTINEL CKQUORUM", "")
    if "NOQUORUM" in no_quorum:
        del questions.refused["SENTINEL CKQUORUM"]
    else:
        no_quorum = ""
    described = [_texts(one) for one in replicas or ()]
    known = frozenset((one["ip"], int(one["port"])) for one in described)
    return [Told(address, _texts(primary), known, no_quorum)]


def _texts(answer: object) -> Mapping[str, str]:
    return {name: value.decode() for name, value in pairs_of(answer).items()}


def sentinel_faults(told: Told, primary: Address) -> Iterator[Fault]:
    """What one of them told.  primary: who holds the data."""
    if told.primary is None:
        why, fix = "It does nothing when the primary fails.", "SENTINEL MONITOR, as on the others."
        yield Fault(Severity.RISKS, "primary", "not known to it", "known", why, fix)
        return
    yield from _flag_faults(told.primary, primary)
    known = int(told.primary["num-other-sentinels"]) + 1
    if known < LEAST:
        why = "With fewer, one that is away leaves no majority, and no replica is ever made primary."
        fix = f"Run {LEAST} on {LEAST} machines."
        yield Fault(Severity.RISKS, "sentinels", f"{known} that it knows", f"at least {LEAST}", why, fix)
    if told.no_quorum:
        why = "When the primary fails, no replica is made primary: publishing and handling stop."
        fix = "Start the Sentinels that are away, or SENTINEL RESET those that are gone for good."
        yield Fault(Severity.RISKS, "quorum", told.no_quorum, "reachable", why, fix)


def _flag_faults(told: Mapping[str, str], primary: Address) -> Iterator[Fault]:
    flags = told["flags"]
    if flags != "master":
        why = "It does not reach the primary, or is in the middle of a failover."
        fix = "Ask again in some seconds; then see its log."
        yield Fault(Severity.RISKS, "flags of the primary", flags, "master", why, fix)
    if (told["ip"], int(told["port"])) != primary:
        found = f"{told['ip']}:{told['port']}"
        why = "Whom clients ask decides where they publish; one of two primaries forgets what it takes."
        fix = "Ask again in some seconds; then see the logs of the Sentinels."
        yield Fault(Severity.RISKS, "primary", found, name_of(primary), why, fix)
