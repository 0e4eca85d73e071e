"""What one server's settings and state say about its safety: pure functions of what it told.

Sources: Redis documentation, "Persistence", "Replication", "WAITAOF", "Key eviction", "INFO"; Valkey's is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from reliamq.spi import Durability, Severity
from reliamq_redis.audit.answers import Server
from reliamq_redis.audit.commands import REPLAY, Commands
from reliamq_redis.audit.rules import Fault, Rule, is_the_word, milder, weighed

__all__ = ["primary_faults", "replica_faults"]

OLDEST = (6, 2)
FULL_FROM = 0.8
EVERYTHING = Durability.DEVELOPMENT

PERSISTENCE = Rule(
    "appendonly",
    is_the_word("yes"),
    "yes",
    Severity.LOSES,
    "What is in memory alone is gone when the process ends, and one that starts again empty empties its replicas too.",
    "appendonly yes",
)
STATE = (
    Rule(
        "aof_last_write_status",
        is_the_word("ok"),
        "ok",
        Severity.LOSES,
        "The append-only file cannot be written: publishing is refused, or the server ends.",
        "Free some of its disk, or mend it.",
    ),
    Rule(
        "aof_last_bgrewrite_status",
        is_the_word("ok"),
        "ok",
        Severity.RISKS,
        "The append-only file cannot be written anew: it grows until its disk is full.",
        "See in the server's log why (memory for a fork, disk), then: BGREWRITEAOF.",
    ),
    Rule(
        "rdb_last_bgsave_status",
        is_the_word("ok"),
        "ok",
        Severity.RISKS,
        "Where snapshots are asked for, publishing is refused after one that failed; a replica may not be taken in.",
        "See in the server's log why (memory for a fork, disk), then: BGSAVE.",
    ),
)
MEMORY = (
    Rule(
        "maxmemory-policy",
        is_the_word("noeviction"),
        "noeviction",
        Severity.LOSES,
        "When memory is full, keys are removed: whole streams, or the marks by which an effect is not applied twice.",
        "maxmemory-policy noeviction",
        EVERYTHING,
    ),
    Rule(
        "evicted_keys",
        is_the_word("0"),
        "0",
        Severity.RISKS,
        "Keys were removed because memory was full; nobody knows which, whatever the policy is by now.",
        f"If reliamq's may have been among them: {REPLAY}; then:",
        EVERYTHING,
    ),
)
TRUNCATED = Rule(
    "aof-load-truncated",
    is_the_word("no"),
    "no, or known",
    Severity.NOTE,
    "After a crash in the middle of a write the file is loaded without its torn end, and nobody is asked.",
    "Nothing; with 'no' such a server does not start until somebody has looked (redis-check-aof).",
)


def primary_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    """Of one that holds data."""
    yield from _role_faults(server)
    yield from _settings_faults(server, durability, commands)
    yield from _version_faults(server)


def replica_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    """Of one that is the primary after a failover: one step milder, and without notes."""
    for fault in _settings_faults(server, durability, commands):
        if fault.severity is Severity.UNSEEN:
            yield fault
        elif fault.severity is not Severity.NOTE:
            why = f"After a failover it is the primary. {fault.why}"
            yield replace(fault, severity=milder(fault.severity), why=why)


def _settings_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    yield from _persistence_faults(server, durability, commands)
    yield from _eviction_faults(server, durability, commands)
    yield from _memory_faults(server, durability, commands)
    yield from _untold_faults(server, commands)


def _role_faults(server: Server) -> Iterator[Fault]:
    if server.role in (None, "master"):
        return
    primary = f"{server.told('master_host')}:{server.told('master_port')}"
    why = "A replica refuses whatever is published to it, and what its primary confirmed may not be there."
    fix = f"Name the primary ({primary}) in the URL, or Sentinels, who know who it is."
    yield Fault(Severity.LOSES, "role", f"replica of {primary}", "primary", why, fix)


# --- on the disk ------------------------------------------------------------------------------------------------------


def _persistence_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    is_off = PERSISTENCE.judge(server.told("appendonly"), durability, commands.set(server.address, "appendonly", "yes"))
    if is_off is not None:
        yield is_off
        return
    yield from _fsync_faults(server, durability, commands)
    yield from _no_fsync_faults(server, durability, commands)
    for rule in (*STATE, TRUNCATED):
        if fault := rule.judge(server.told(rule.setting), durability, rule.change):
            yield fault


def _fsync_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    """What ``everysec`` means depends on whether a confirmation can wait for the disk."""
    found, severity = server.told("appendfsync"), Severity.LOSES
    if found in (None, "always"):
        return
    if found == "everysec" and server.waits_for_disk:
        severity = Severity.NOTE
        why = (
            "Confirmations wait for the disk all the same (WAITAOF), a second longer. Acknowledgements and attempts of "
            "the last second may be forgotten with the machine: those messages come again."
        )
    elif server.waits_for_disk:
        why = "The server never says that something is on its disk (WAITAOF), so nothing is ever confirmed."
    else:
        why = "It is confirmed before it is on the disk, and lost with the machine: the server has no WAITAOF."
    fix = commands.set(server.address, "appendfsync", "always")
    severity = weighed(severity, durability, Durability.FSYNCED)
    yield Fault(severity, "appendfsync", str(found), "always", why, fix)


def _no_fsync_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    setting = "no-appendfsync-on-rewrite"
    found = server.told(setting)
    if found in (None, "no"):
        return
    severity = weighed(Severity.LOSES, durability, Durability.FSYNCED)
    why = "While the file is written anew, it is confirmed before it is on the disk, and lost with the machine."
    if server.waits_for_disk:
        severity = Severity.NOTE
        why = "While the file is written anew, nothing is confirmed, and what is acknowledged may be forgotten."
    yield Fault(severity, setting, str(found), "no", why, commands.set(server.address, setting, "no"))


# --- in memory --------------------------------------------------------------------------------------------------------


def _eviction_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    policy, evicted = MEMORY
    fix = commands.set(server.address, *policy.change.split())
    if fault := policy.judge(server.told(policy.setting), durability, fix):
        yield fault
    fix = f"{evicted.change} {commands.run(server.address, 'CONFIG', 'RESETSTAT')}"
    if fault := evicted.judge(server.told(evicted.setting), durability, fix):
        yield fault


def _memory_faults(server: Server, durability: Durability, commands: Commands) -> Iterator[Fault]:
    limit, used = server.number("maxmemory"), server.number("used_memory")
    if limit is None or used is None:
        return
    used -= server.number("mem_not_counted_for_evict") or 0
    if limit == 0:
        why = "Without a limit the operating system ends the server when memory is full, instead of it refusing."
        fix = commands.set(server.address, "maxmemory", "BYTES")
        yield Fault(Severity.NOTE, "maxmemory", "0", "a limit below the machine's memory", why, fix)
    elif used >= FULL_FROM * limit:
        yield _is_filled(server, used, limit, durability, commands)


def _is_filled(server: Server, used: int, limit: int, durability: Durability, commands: Commands) -> Fault:
    """Nothing that was confirmed is lost by it; but nothing can be published, so an application must not start."""
    is_full = used >= limit
    severity = weighed(Severity.LOSES if is_full else Severity.RISKS, durability, EVERYTHING)
    why = "Publishing and declaring are refused; nothing that was confirmed is lost."
    if not is_full:
        why = f"When it is full: {why[0].lower()}{why[1:]}"
    fix = f"{commands.set(server.address, 'maxmemory', 'BYTES')}; or let groups catch up, or keep less (retention)."
    found = f"{used} of {limit} bytes ({used / limit:.0%})"
    return Fault(severity, "memory used", found, f"below {FULL_FROM:.0%} of maxmemory", why, fix)


# --- what it is -------------------------------------------------------------------------------------------------------


def _version_faults(server: Server) -> Iterator[Fault]:
    version = server.version
    if version is not None and version < OLDEST:
        found, why = _shown(server), "reliamq is tested with 7.0 and later, and uses what came with 6.2."
        yield Fault(Severity.RISKS, "version", found, "at least 6.2", why, "Upgrade, replicas first.")
    elif not server.waits_for_disk:
        found = f"not known to this version ({_shown(server)})"
        why = (
            "A confirmation says that the message is on the primary's disk (appendfsync always) and in the replicas' "
            "memories; it cannot say that it is on theirs."
        )
        yield Fault(Severity.NOTE, "WAITAOF", found, "Redis 7.2, or Valkey", why, "Upgrade, replicas first.")


def _shown(server: Server) -> str:
    return ".".join(map(str, server.version)) if server.version else "not told"


NEEDED = (
    "role",
    "connected_slaves",
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "aof_last_write_status",
    "aof_last_bgrewrite_status",
    "maxmemory-policy",
    "evicted_keys",
    "maxmemory",
    "used_memory",
)


def _untold_faults(server: Server, commands: Commands) -> Iterator[Fault]:
    """Values that the server keeps to itself, as hosted ones do."""
    settings = [*NEEDED, *(["min-replicas-to-write"] if server.role != "slave" else [])]
    untold = [setting for setting in settings if server.told(setting) is None]
    if server.knows_waitaof is None:
        untold.append("WAITAOF")
    if not untold:
        return
    said = "; ".join(f"{question}: {answer}" for question, answer in sorted(server.refused.items()))
    found = f"not told: {', '.join(untold)}{f' ({said})' if said else ''}"
    permit = commands.permit(server.address, ["info", "config|get", "command"])
    fix = f"{permit}; or ask who runs it, and look yourself: {commands.run(server.address, 'CONFIG', 'GET', untold[0])}"
    yield Fault(Severity.UNSEEN, "settings", found, "readable", "What cannot be read is not known to be safe.", fix)
