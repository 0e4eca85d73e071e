"""How far a group is on one partition, as it is committed: an offset, and in the commit's metadata what an offset
cannot say.

Kafka keeps a text with each committed offset.  Here it holds which later records are finished already (handlers finish
out of order), the attempts of those that are not (C4), until when they wait (C6), and up to where records may have been
handed out, so that whoever comes after a crash knows which starts must be recorded.  It is written in the same request
as the offset, and so costs nothing more, and it needs no database.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["MAX_CHARACTERS", "MAX_MARKS", "Attempts", "Progress", "decode", "encode"]

MAX_CHARACTERS = 4_000
"""A broker refuses metadata over ``offset.metadata.max.bytes``, 4096 unless somebody changed it."""
MAX_MARKS = 400
"""So many records with attempts always fit."""
COMPRESSED = "z"
BEGUN, APART = 1, 2
VERSION = 1
MARK = 5  # numbers for each record with attempts


@dataclass(frozen=True, slots=True)
class Attempts:
    """What is known of one unfinished record.

    failures, crashes: as a Delivery has them.  begun: a start was recorded and has no end yet.
    apart: its key's others do not wait for it.  due: tenths of a second of wall-clock time before which it is not
        handed out; 0: at once.
    """

    failures: int = 0
    crashes: int = 0
    begun: bool = False
    apart: bool = False
    due: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """One partition's state for one group.

    offset: everything below is finished.
    known: of the records below it all are finished that ``unfinished`` does not name; of those above, none.
    unfinished: offsets from ``offset`` to ``known``, growing.
    limit: records at and above it were certainly never handed out.
    attempts: by offset; others have none.
    """

    offset: int
    known: int
    limit: int
    unfinished: Sequence[int] = ()
    attempts: Mapping[int, Attempts] = field(default_factory=dict)


def encode(progress: Progress) -> str:
    """The metadata, never too long.

    If the unfinished ones do not fit, fewer records are said to be finished: after a crash those come again, and their
    processed ids say so.  If the attempts do not fit, what waits comes again sooner; those of more than ``MAX_MARKS``
    records are written as far as they fit.
    """
    runs = _runs(progress.unfinished)
    text = _text(progress, progress.known, runs)
    while len(text) > MAX_CHARACTERS and runs:
        runs = runs[: len(runs) * 3 // 4]
        text = _text(progress, sum(runs[-1]) if runs else progress.offset, runs)
    attempts = [(offset, replace(one, due=0)) for offset, one in sorted(progress.attempts.items())]
    while len(text) > MAX_CHARACTERS:
        text = _text(replace(progress, attempts=dict(attempts)), progress.offset, ())
        attempts = attempts[: len(attempts) * 3 // 4]
    return text


def _text(progress: Progress, known: int, runs: Sequence[tuple[int, int]]) -> str:
    base = min((one.due for one in progress.attempts.values() if one.due), default=1) - 1
    numbers = [
        VERSION,
        known - progress.offset,
        progress.limit - progress.offset,
        base,
        _flat_runs(progress.offset, runs),
        _flat_marks(progress.offset, progress.attempts, base),
    ]
    plain = json.dumps(numbers, separators=(",", ":"))
    if len(plain) <= MAX_CHARACTERS // 4:
        return plain  # most are short, and then a person can read them
    return COMPRESSED + base64.b85encode(zlib.compress(plain.encode())).decode()


def _flat_runs(offset: int, runs: Sequence[tuple[int, int]]) -> list[int]:
    flat: list[int] = []
    for first, count in runs:
        flat += (first - offset, count)
        offset = first + count
    return flat


def _flat_marks(offset: int, attempts: Mapping[int, Attempts], base: int) -> list[int]:
    flat: list[int] = []
    for place, one in sorted(attempts.items()):
        flags = BEGUN * one.begun | APART * one.apart
        flat += (place - offset, one.failures, one.crashes, flags, one.due and one.due - base)
        offset = place
    return flat


def decode(offset: int, metadata: str) -> Progress | None:
    """Read what :func:`encode` wrote; None for a text that is none of ours (an administrator's reset, say)."""
    try:
        if metadata.startswith(COMPRESSED):
            metadata = zlib.decompress(base64.b85decode(metadata[1:])).decode()
        version, known, limit, base, runs, marks = json.loads(metadata)
        if version != VERSION:
            return None
        return Progress(
            offset, offset + known, offset + limit, _unfinished(offset, runs), _attempts(offset, marks, base)
        )
    except (ValueError, TypeError, zlib.error):
        return None


def _unfinished(offset: int, flat: Sequence[int]) -> list[int]:
    unfinished: list[int] = []
    for gap, count in zip(flat[::2], flat[1::2], strict=True):
        unfinished.extend(range(offset + gap, offset + gap + count))
        offset += gap + count
    return unfinished


def _attempts(offset: int, marks: Sequence[int], base: int) -> dict[int, Attempts]:
    found: dict[int, Attempts] = {}
    for start in range(0, len(marks), MARK):
        gap, failures, crashes, flags, due = marks[start : start + MARK]
        offset += gap
        found[offset] = Attempts(failures, crashes, bool(flags & BEGUN), bool(flags & APART), due and due + base)
    return found


def _runs(offsets: Iterable[int]) -> list[tuple[int, int]]:
    """First and length of each unbroken run."""
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((offset, 1))
    return runs
