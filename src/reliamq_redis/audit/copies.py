"""Whether what is confirmed is on several machines, and stays there when one of them fails: pure functions.

A primary with its replicas is judged by itself; in a Cluster there are several.  Sources: Redis documentation,
"Replication", "WAIT", "WAITAOF", "High availability with Redis Sentinel" ("last failover wins": there is always a
window for losing acknowledged writes), "Redis cluster specification" ("Write safety").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reliamq.spi import Durability, Finding, Severity
from reliamq_redis.audit.answers import Replica, Server, name_of
from reliamq_redis.audit.commands import REPLAY, Commands
from reliamq_redis.audit.rules import Fault, names_of, weighed
from reliamq_redis.settings import Deployment, RedisSettings
from reliamq_redis.wire.servers import Address

__all__ = ["Copies", "client_findings", "copies_faults", "known_replicas", "spread_findings"]

SILENT_SECONDS = 10
"""A replica that was not heard of for so long is as good as away: Redis' own ``min-replicas-max-lag``.  And one that is
there connects to a primary that was restarted in less.
"""


@dataclass(frozen=True, slots=True)
class Copies:
    """A primary and what is known of its replicas.

    known: those that the primary, the Sentinels or the Cluster's nodes know, there or not.
    seen: what those told of themselves that could be asked.
    """

    primary: Server
    known: frozenset[Address]
    seen: Mapping[Address, Server]

    @property
    def online(self) -> list[Replica]:
        """That have everything, but for what is on its way."""
        return [one for one in self.primary.replicas if one.state == "online" and one.lag_seconds <= SILENT_SECONDS]

    @property
    def confirming(self) -> list[Replica]:
        """Those of them that can say that they have something: on their disks, where that is waited for."""
        return [one for one in self.online if not self._keeps_nothing(one)]

    @property
    def are_coming(self) -> bool:
        """Whether some that are not online may be soon: a primary that was just started has forgotten its replicas."""
        uptime = self.primary.number("uptime_in_seconds")
        return len(self.online) < len(self.known) or (uptime is not None and uptime < SILENT_SECONDS)

    def _keeps_nothing(self, replica: Replica) -> bool:
        server = self.seen.get(replica.address)
        if server is None or not self.primary.waits_for_disk:
            return False
        return server.told("appendonly") == "no" or server.told("appendfsync") == "no"

    def shown(self) -> str:
        """``1 (10.0.0.2:6379 is online, 10.0.0.3:6379 away)``."""
        states = {one.address: self._state(one) for one in self.primary.replicas}
        all_of_them = sorted(self.known | states.keys())
        told = ", ".join(f"{name_of(one)} is {states.get(one, 'away')}" for one in all_of_them)
        return f"{len(self.confirming)} ({told or 'there is none'})"

    def _state(self, replica: Replica) -> str:
        if replica.state == "online" and replica.lag_seconds > SILENT_SECONDS:
            return f"silent for {replica.lag_seconds} s"
        return "online, without keeping it on its disk" if self._keeps_nothing(replica) else replica.state


def known_replicas(connected: frozenset[Address], told: frozenset[Address]) -> frozenset[Address]:
    """connected: by the addresses that their primary tells.  told: by Sentinels or the Cluster's nodes, there or not.

    As many connected as told are the same, whatever their addresses: a replica may have several names.
    """
    return connected if len(connected) >= len(told) else connected | told


def copies_faults(
    copies: Copies, settings: RedisSettings, durability: Durability, commands: Commands
) -> Iterator[Fault]:
    """Of one primary.  Of one that tells nothing of its replicas that is said elsewhere, and so of what is none."""
    if copies.primary.told("connected_slaves") is None or copies.primary.role != "master":
        return
    yield from _few_faults(copies, settings, durability)
    yield from _forgetting_faults(copies, settings, durability)
    yield from _refusal_faults(copies, settings, durability, commands)


def _few_faults(copies: Copies, settings: RedisSettings, durability: Durability) -> Iterator[Fault]:
    asked, there = max(1, settings.replicas), len(copies.confirming)
    away = sorted(copies.known - {one.address for one in copies.online})
    if there < asked:
        severity, required = Severity.LOSES, f"at least {asked} ('replicas')"
        why = "Nothing is confirmed before so many have it, and what is there is lost with the machines that have it."
        if not settings.replicas:
            why = "The only copy of what is confirmed is lost with its disk."
    elif away:
        severity, required = Severity.RISKS, f"all {len(copies.known)}"
        why = "With one more away nothing may be confirmed; and if one of these becomes primary, what it lacks is lost."
    else:
        return
    fix = "Add replicas (REPLICAOF), or turn on what keeps them from confirming (appendonly yes)."
    if away:
        names = names_of([name_of(one) for one in away])
        fix = f"Start {names}, or see its log. One that is gone for good: SENTINEL RESET, or CLUSTER FORGET."
    severity = weighed(severity, durability)
    yield Fault(severity, "replicas online", copies.shown(), required, why, fix, passing=copies.are_coming)


def _forgetting_faults(copies: Copies, settings: RedisSettings, durability: Durability) -> Iterator[Fault]:
    """Redis has no quorum: any replica can become primary, and only if all have a message that forgets nothing."""
    waited = settings.replicas if durability is Durability.REPLICATED else 0
    there = len(copies.known)
    if waited >= there:
        return
    by_itself = settings.deployment is not Deployment.STANDALONE
    severity = Severity.RISKS if by_itself and durability is not Durability.DEVELOPMENT else Severity.NOTE
    why = "A failover to a replica that did not have it yet forgets a message that was confirmed: Redis has no quorum."
    if not by_itself:
        why = f"No failover comes by itself here. {why}"
    fix = (
        f"Set 'replicas' to {there}: then none is forgotten, and publishing waits for every replica. Or keep the "
        f"outbox's sent rows, and after each failover: {REPLAY}; it brings every effect to exactly one."
    )
    if durability is not Durability.REPLICATED:
        fix = f"Ask for 'replicated'. {fix}"
    found = f"a confirmation waits for {waited} of {there} replicas"
    yield Fault(severity, "failover", found, f"for all {there}", why, fix)


def _refusal_faults(
    copies: Copies, settings: RedisSettings, durability: Durability, commands: Commands
) -> Iterator[Fault]:
    """What a primary does that lost its replicas."""
    setting, server = "min-replicas-to-write", copies.primary
    least, lag = server.number(setting), server.number("min-replicas-max-lag")
    if least is None:
        return  # which is said among what was not told
    in_effect, good = least if lag != 0 else 0, server.number("min_slaves_good_slaves")  # lag 0: off (redis.conf)
    change = f"{commands.set(server.address, setting, str(settings.replicas))} (on all servers)"
    if in_effect and good is not None and good < in_effect:
        why = "Everything that is written is refused (NOREPLICAS), so nothing can be published or settled."
        found = f"{in_effect}, and {good} are there"
        fix = f"Start replicas, or: {change}"
        yield Fault(Severity.LOSES, setting, found, "no more than are there", why, fix, passing=copies.are_coming)
    elif in_effect < settings.replicas and copies.known:
        why = (
            "A primary that is cut off from its replicas, while one of them becomes primary, goes on taking "
            "acknowledgements and attempts that are forgotten afterwards: those messages come again. Nothing that it "
            "takes for publishing is confirmed."
        )
        found = str(least) if lag != 0 else f"{least}, without min-replicas-max-lag"
        severity = weighed(Severity.RISKS, durability)
        yield Fault(severity, setting, found, f"at least {settings.replicas} ('replicas')", why, change)


# --- for all primaries at once ----------------------------------------------------------------------------------------


def client_findings(settings: RedisSettings, durability: Durability) -> Iterator[Finding]:
    """What this client is set to."""
    subject = "this client"
    if not settings.replicas and durability is Durability.REPLICATED:
        why = "A message is confirmed when one server has it, and is lost with that machine."
        fix = "Set 'replicas' to 1 or more, or ask for 'fsynced' where one machine's disk is enough."
        yield Finding(Severity.LOSES, subject, "replicas", "0", "at least 1 for 'replicated'", why, fix)
    if settings.password is not None and not settings.tls:
        why = "Who listens on the network reads user, password and messages, and can publish and settle in their name."
        yield Finding(Severity.NOTE, subject, "tls", "off", "on where there is a password", why, "Use rediss://.")


def spread_findings(
    subject: str, all_of_them: Sequence[Copies], settings: RedisSettings, durability: Durability
) -> Iterator[Finding]:
    """Machines and racks, of which Redis knows nothing."""
    if durability is not Durability.REPLICATED or not settings.replicas:
        return
    hosts = {copies.primary.address[0] for copies in all_of_them} | {
        address[0] for copies in all_of_them for address in copies.known
    }
    found = f"{settings.replicas + 1} that a confirmation waits for"
    found += f", all at {next(iter(hosts))}" if len(hosts) == 1 else f", at {len(hosts)} addresses"
    why = "Redis does not know which servers fail together: copies on one machine, or on one rack, are as good as one."
    fix = "Look where the servers run; three copies survive more than two (add replicas and set 'replicas' to 2)."
    required = "different machines, better three racks"
    yield Finding(Severity.NOTE, subject, "copies", found, required, why, fix)
