"""What a lock for what must run in one place at a time is asked for with (I4)."""

from __future__ import annotations

from datetime import timedelta

from reliamq.spi.arguments import check_time, need

__all__ = ["DEFAULT_LEASE", "check_lock"]

DEFAULT_LEASE = timedelta(seconds=30)
MAX_NAME_CHARACTERS = 255  # the column's width


def check_lock(name: str, lease: timedelta, wait: timedelta) -> None:
    """Raises ConfigurationError naming the parameter that is wrong."""
    fine = isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME_CHARACTERS
    need(fine, "lock: name", f"1 to {MAX_NAME_CHARACTERS} printable characters", name)
    check_time(f"lock '{name}': lease", lease)
    check_time(f"lock '{name}': wait", wait, may_be_zero=True)
