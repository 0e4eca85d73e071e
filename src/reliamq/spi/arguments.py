"""Checks of what a caller wrote in code: who asked, for which parameter, what is wanted, what came instead.

Each raises ConfigurationError.  Settings, which come from outside, are checked by pydantic in ``reliamq.settings``.
"""

from __future__ import annotations

from datetime import timedelta

from reliamq.spi.errors import ConfigurationError

__all__ = ["NAME_CHARACTERS", "check_name", "check_time", "check_whole_number", "need", "shown"]

NAME_CHARACTERS = 150
"""Longest name of a topic or group: what the narrowest column and the strictest broker hold."""
SHOWN_CHARACTERS = 60
NOTHING = timedelta(0)


def need(fine: bool, what: str, wanted: str, value: object) -> None:
    """Refuse ``value`` unless it is fine.  what: whose parameter.  wanted: what it must be."""
    if not fine:
        raise ConfigurationError(f"{what} must be {wanted}, not {shown(value)}")


def shown(value: object) -> str:
    """A value as an error shows it: its type and itself, shortened."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + '…'}"


def check_name(what: str, name: object) -> None:
    """Names of topics and groups become parts of paths, of columns and of other systems' names."""
    wanted = f"1 to {NAME_CHARACTERS} printable characters without spaces, '/' and '@'"
    fine = isinstance(name, str) and name.isprintable() and not set(name) & set(" /@")
    need(fine and 0 < len(str(name)) <= NAME_CHARACTERS, what, wanted, name)


def check_whole_number(what: str, number: object, *, least: int) -> None:
    """A whole number; True and False are none."""
    need(isinstance(number, int) and not isinstance(number, bool), what, "a whole number", number)
    need(isinstance(number, int) and number >= least, what, f"at least {least}", number)


def check_time(what: str, time: object, *, may_be_zero: bool = False) -> None:
    """A length of time that does not run backwards."""
    hint = f"; write timedelta(seconds={time!r})" if isinstance(time, int | float) else ""
    if not isinstance(time, timedelta):
        raise ConfigurationError(f"{what} must be a timedelta, not {shown(time)}{hint}")
    if time < NOTHING or (not may_be_zero and not time):
        raise ConfigurationError(
            f"{what} must {'not be negative' if may_be_zero else 'be longer than nothing'}: {time}"
        )
