"""What the live file says about itself, as findings (S2).

It promises to read every value from where it acts (the open connection, the file, its mount) and to change nothing.  A
value that cannot be read is said to be unseen.  Deciding whether an application may start is the core's.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from reliamq.embedded.opening import APPLICATION_ID, SCHEMA_VERSION
from reliamq.embedded.settings import Location
from reliamq.spi import Durability, Finding, Severity, TopicSpec

__all__ = ["audit", "durability_findings", "file_system_finding", "limit_findings", "missing_file_findings"]

MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.glusterfs"}
)
LEAST_FREE_BYTES = 256 << 20
LARGEST_WAL_BYTES = 512 << 20
DECLARE = "Start the application once, or call 'await app.declare()'."

TOPIC = "SELECT retention, max_message_bytes FROM topic WHERE name = ?"
GROUPS = "SELECT g.name FROM group_ g JOIN topic t ON t.id = g.topic_id WHERE t.name = ?"


# --- of declaring and of the audit ----------------------------------------------------------------------------


def durability_findings(topics: Sequence[TopicSpec], durability: Durability) -> Iterator[Finding]:
    """Topics that ask for more than one machine, or memory, can give (P1)."""
    for spec in topics:
        if spec.durability <= durability:
            continue
        memory = durability is Durability.DEVELOPMENT
        yield Finding(
            Severity.LOSES,
            f"topic {spec.name}",
            "durability",
            durability.name.lower(),
            spec.durability.name.lower(),
            "Messages are lost with the process." if memory else "Messages are lost with the machine's disk.",
            "Use embedded:// with a file, or a networked broker."
            if memory
            else "Use a networked broker (kafka://, rabbitmq://, redis://), or require only 'fsynced'.",
            "P1",
        )


def limit_findings(spec: TopicSpec, retention: float, limit: int) -> Iterator[Finding]:
    """Where a topic has more than is asked: left alone, because less would be weaker (S1)."""
    asked = spec.retention.total_seconds()
    more = "It was declared with more before, and declaring never lowers; nothing is lost."
    if retention > asked:
        yield _of_topic(spec, "retention", _seconds(retention), _seconds(asked), Severity.NOTE, more)
    if limit > spec.max_message_bytes:
        yield _of_topic(spec, "max_message_bytes", str(limit), str(spec.max_message_bytes), Severity.NOTE, more)


def _of_topic(
    spec: TopicSpec,
    setting: str,
    found: str,
    required: str,
    severity: Severity,
    why: str,
    fix: str = "Declare it with what every user of it needs.",
) -> Finding:
    return Finding(severity, f"topic {spec.name}", setting, found, required, why, fix)


def _seconds(seconds: float) -> str:
    return str(timedelta(seconds=seconds))


# --- the audit ------------------------------------------------------------------------------------------------


def audit(connection: sqlite3.Connection, location: Location, topics: Sequence[TopicSpec]) -> list[Finding]:
    """Everything there is to say about the file and the topics in it."""
    findings = [finding for spec in topics for finding in _topic_findings(connection, spec)]
    if location.path is not None:
        findings += _connection_findings(connection, location.path)
        findings += _room_findings(connection, location.path, location.settings.max_bytes)
        findings += _file_findings(location.path)
        findings += file_system_finding(location.path, Path("/proc/mounts"))
    return findings


def _topic_findings(connection: sqlite3.Connection, spec: TopicSpec) -> Iterator[Finding]:
    row = connection.execute(TOPIC, (spec.name,)).fetchone()
    if row is None:
        yield _missing_topic(spec)
        return
    retention, limit = row
    yield from limit_findings(spec, retention, limit)
    if retention < spec.retention.total_seconds():
        why = "A group that is declared later misses what was removed before."
        yield _of_topic(
            spec, "retention", _seconds(retention), _seconds(spec.retention.total_seconds()), Severity.RISKS, why
        )
    if limit < spec.max_message_bytes:
        why = "Larger messages are rejected; none that was confirmed is lost."
        yield _of_topic(spec, "max_message_bytes", str(limit), str(spec.max_message_bytes), Severity.NOTE, why)
    declared = {name for (name,) in connection.execute(GROUPS, (spec.name,)).fetchall()}
    for group in spec.groups:
        if group.name not in declared:
            why = "Until it is declared it gets nothing; what is published now it gets only within the retention."
            yield _of_topic(spec, f"group {group.name}", "missing", "declared", Severity.LOSES, why, DECLARE)


def missing_file_findings(location: Location, topics: Sequence[TopicSpec]) -> list[Finding]:
    """What there is to say when the broker's file is not there: nothing in it can be vouched for."""
    why = "The broker is not there: nothing can be published to it, and what was in it is gone."
    fix = f"Correct the URL, or, where it is to be a new one: {DECLARE[0].lower()}{DECLARE[1:]}"
    missing = Finding(Severity.LOSES, location.path or location.url, "file", "missing", "there", why, fix)
    return [missing, *(_missing_topic(spec) for spec in topics)]


def _missing_topic(spec: TopicSpec) -> Finding:
    why = "Publishing to it is rejected as unroutable."
    return _of_topic(spec, "topic", "missing", "declared", Severity.RISKS, why, DECLARE)


def _connection_findings(connection: sqlite3.Connection, path: str) -> Iterator[Finding]:
    def value(pragma: str) -> object:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    required = {
        "journal_mode": ("wal", "A crash can tear a transaction, or readers and writers block one another."),
        "synchronous": (2, "A confirmed message can be lost in a power cut."),
        "application_id": (APPLICATION_ID, "The file was turned into another application's."),
        "user_version": (SCHEMA_VERSION, "Another reliamq has changed the schema while this one runs."),
    }
    for pragma, (wanted, why) in required.items():
        found = value(pragma)
        if found != wanted:
            yield Finding(
                Severity.LOSES, path, pragma, str(found), str(wanted), why, "Restart, and find out who changed it."
            )


def _room_findings(connection: sqlite3.Connection, path: str, max_bytes: int | None) -> Iterator[Finding]:
    if max_bytes is None:
        return
    page_bytes, pages, unused = (
        connection.execute(f"PRAGMA {pragma}").fetchone()[0] for pragma in ("page_size", "page_count", "freelist_count")
    )
    used = page_bytes * (pages - unused)
    if used > 0.9 * max_bytes:
        why = "Soon publishing is rejected as full; nothing that was confirmed is lost."
        fix = "Raise max_bytes, shorten retention, or let the groups catch up."
        yield Finding(Severity.RISKS, path, "bytes in use", f"{used} of {max_bytes}", "below 90 %", why, fix)


def _file_findings(path: str) -> Iterator[Finding]:
    for suffix in ("", "-wal", "-shm", "-lock"):
        try:
            status = os.stat(path + suffix)
        except FileNotFoundError:
            if not suffix:
                why = "It was deleted while in use: what is written to it now is gone when it is closed."
                yield Finding(Severity.LOSES, path, "file", "missing", "there", why, "Restart and declare again.")
            continue
        if not os.access(path + suffix, os.W_OK):
            why = "This process cannot write it: publishing and settling will fail."
            yield Finding(Severity.RISKS, path + suffix, "access", "read-only", "writable", why, "Fix owner and mode.")
        if status.st_mode & stat.S_IWOTH:
            why = "Any user of the machine can change or delete messages."
            mode = stat.filemode(status.st_mode)
            yield Finding(Severity.RISKS, path + suffix, "mode", mode, "not writable by others", why, "chmod o-w.")
        if suffix == "-wal" and status.st_size > LARGEST_WAL_BYTES:
            why = "Some program has an old read transaction open, so that the log only grows until the disk is full."
            found, most = f"{status.st_size} bytes", f"{LARGEST_WAL_BYTES} bytes"
            yield Finding(Severity.RISKS, path + suffix, "size", found, most, why, "Find and close that program.")
    free = shutil.disk_usage(os.path.dirname(path)).free
    if free < LEAST_FREE_BYTES:
        why = "On a full disk publishing is rejected and nothing can be acknowledged."
        found, least = f"{free} bytes", f"{LEAST_FREE_BYTES} bytes"
        yield Finding(Severity.RISKS, os.path.dirname(path), "free disk", found, least, why, "Make room.")


def file_system_finding(path: str, mounts: Path) -> Iterator[Finding]:
    """What kind of file system the file is on, by the kernel's table of mounts.

    A file system in memory loses everything in a power cut; SQLite's WAL needs memory that all its processes share,
    which file systems over a network do not give.
    """
    try:
        kind = _kind_of_mount(path, mounts.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        why = "Whether a commit reaches a disk depends on it."
        fix = f"Make sure that it is a local disk ({mounts}: {error.strerror})."
        yield Finding(Severity.UNSEEN, path, "file system", "unknown", "a local disk", why, fix)
        return
    if kind in MEMORY_FILE_SYSTEMS:
        why = "It is memory: a restart of the machine loses every message."
    elif kind in NETWORK_FILE_SYSTEMS:
        why = "It is reached over a network, where SQLite's locks and shared memory do not hold."
    else:
        return
    yield Finding(Severity.LOSES, path, "file system", kind, "a local disk", why, "Move the file to a local disk.")


def _kind_of_mount(path: str, table: str) -> str:
    """The file system's kind of the longest mount point that is above ``path``; later mounts hide earlier ones."""
    best, kind = "", "unknown"
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ").rstrip("/")
        if len(point) >= len(best) and (path + "/").startswith(point + "/"):
            best, kind = point, fields[2]
    return kind
