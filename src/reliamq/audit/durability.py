"""What a broker can promise at best, against what is required of it; also where there is no topic yet to ask for it.

Only what the backend says of itself is judged here; its live values are the backend's own audit.
"""

from __future__ import annotations

from collections.abc import Sequence

from reliamq.settings import masked
from reliamq.spi import Backend, Durability, Finding, Severity

__all__ = ["audit_durability"]

FIX = "Use embedded:// with a file, or a networked broker."


def audit_durability(backend: Backend, required: Durability | None) -> Sequence[Finding]:
    """A broker that can lose what it confirmed is never a pass.

    required: what the user asked for, or None; asking for *development* in so many words makes it a note.
    """
    best = backend.capabilities.durability
    if best is Durability.DEVELOPMENT:
        return [_development(backend, required)]
    if required is not None and required > best:
        why = "What is confirmed has survived less than is required."
        return [_finding(backend, Severity.LOSES, required, why, "Use a broker that can, or require less.")]
    return []


def _development(backend: Backend, required: Durability | None) -> Finding:
    lost = "All messages are gone when the process ends." if not backend.capabilities.survives_restart else ""
    if required is Durability.DEVELOPMENT:
        why = f"THIS BROKER LOSES MESSAGES, and 'durability = \"development\"' says that it may. {lost}".strip()
        return _finding(backend, Severity.NOTE, Durability.DEVELOPMENT, why, f"For data that matters: {FIX}")
    why = lost or "What is confirmed may be in the memory of one node alone."
    return _finding(backend, Severity.LOSES, max(required or Durability.FSYNCED, Durability.FSYNCED), why, FIX)


def _finding(backend: Backend, severity: Severity, required: Durability, why: str, fix: str) -> Finding:
    found = backend.capabilities.durability.name.lower()
    subject = f"broker {masked(backend.url)}"
    return Finding(severity, subject, "durability", found, required.name.lower(), why, fix, "P1")
