"""reliamq: every message from a committed business transaction to a finished effect, none lost, none applied twice.

The public names are loaded when they are first used (PEP 562), so that a backend which imports ``reliamq.spi`` pays for
nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reliamq import outbox as outbox
    from reliamq.app import Reliamq as Reliamq
    from reliamq.handlers import Backoff as Backoff, DeadLetter as DeadLetter, RetryAfter as RetryAfter
    from reliamq.settings import Settings as Settings
    from reliamq.spi import (
        BrokerUnavailable as BrokerUnavailable,
        ConfigurationError as ConfigurationError,
        Confirmation as Confirmation,
        Delivery as Delivery,
        Durability as Durability,
        DurabilityError as DurabilityError,
        FencingToken as FencingToken,
        GroupSpec as GroupSpec,
        InvalidMessage as InvalidMessage,
        Message as Message,
        Rejected as Rejected,
        ReliamqError as ReliamqError,
        StorageFull as StorageFull,
        StoreUnavailable as StoreUnavailable,
        TooLarge as TooLarge,
        Unconfirmed as Unconfirmed,
        Unroutable as Unroutable,
    )
    from reliamq.topics import Topic as Topic

_HOME = {
    "Backoff": "reliamq.handlers",
    "BrokerUnavailable": "reliamq.spi",
    "ConfigurationError": "reliamq.spi",
    "Confirmation": "reliamq.spi",
    "DeadLetter": "reliamq.handlers",
    "Delivery": "reliamq.spi",
    "Durability": "reliamq.spi",
    "DurabilityError": "reliamq.spi",
    "FencingToken": "reliamq.spi",
    "GroupSpec": "reliamq.spi",
    "InvalidMessage": "reliamq.spi",
    "Message": "reliamq.spi",
    "Rejected": "reliamq.spi",
    "Reliamq": "reliamq.app",
    "ReliamqError": "reliamq.spi",
    "RetryAfter": "reliamq.handlers",
    "Settings": "reliamq.settings",
    "StorageFull": "reliamq.spi",
    "StoreUnavailable": "reliamq.spi",
    "TooLarge": "reliamq.spi",
    "Topic": "reliamq.topics",
    "Unconfirmed": "reliamq.spi",
    "Unroutable": "reliamq.spi",
    "outbox": "reliamq",
}

__all__ = [  # in the order of the table above, which a test compares
    "Backoff",
    "BrokerUnavailable",
    "ConfigurationError",
    "Confirmation",
    "DeadLetter",
    "Delivery",
    "Durability",
    "DurabilityError",
    "FencingToken",
    "GroupSpec",
    "InvalidMessage",
    "Message",
    "Rejected",
    "Reliamq",
    "ReliamqError",
    "RetryAfter",
    "Settings",
    "StorageFull",
    "StoreUnavailable",
    "TooLarge",
    "Topic",
    "Unconfirmed",
    "Unroutable",
    "outbox",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reliamq' has no attribute '{name}'")
    value = import_module("reliamq.outbox") if name == "outbox" else getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
