"""Lengths of time as people write them in a file: ``30s``, ``5m``, ``2h``, ``1d``, ``500ms``, seconds as a number."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator

__all__ = ["FORMS", "Duration"]

FORMS = "a length of time, such as 500ms, 30s, 5m, 2h, 1d, PT30S, or seconds as a number"
_WRITTEN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d|)", re.IGNORECASE)
_UNITS = {"ms": "milliseconds", "s": "seconds", "": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _read(value: object) -> object:
    """What is no such text is left to pydantic, which knows ISO 8601 and numbers."""
    written = _WRITTEN.fullmatch(value.strip()) if isinstance(value, str) else None
    if written is None:
        return value
    try:
        return timedelta(**{_UNITS[written["unit"].lower()]: float(written["number"])})
    except OverflowError:
        return value


Duration = Annotated[timedelta, BeforeValidator(_read)]
