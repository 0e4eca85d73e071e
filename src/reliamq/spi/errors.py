"""The error tree, whole.

    ReliamqError
    ├─ ConfigurationError      wrong before anything ran
    │  ├─ UnknownScheme · MissingExtra · BrokenPlugin
    │  └─ HandlerSignatureError · DuplicateHandler
    ├─ DurabilityError         the broker falls short: .findings
    ├─ PublishError            .topic .message_id
    │  ├─ Rejected             certain: not stored (Unroutable · TooLarge · InvalidMessage · StorageFull)
    │  └─ Unconfirmed          unknown: may be stored; repeat with the same id
    ├─ DeliveryError           .group .message_id: LeaseLost · Undecodable
    ├─ OutboxError             TransactionRequired
    ├─ NotSupported            the broker cannot do this, ever
    ├─ StoreUnavailable        leases or locks cannot be reached; what was asked may have been done
    └─ BrokerUnavailable       nothing was tried; safe to wait and repeat

*Certain* and *unknown* are different classes, so that nobody forgets a message that may be lost (P2).  Facts are
attributes, the text is made from them.  ``RetryAfter`` and ``DeadLetter``, which a handler raises on purpose, are
signals, not errors, and live with the
handlers: a user's ``except ReliamqError`` cannot eat them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reliamq.spi.outcomes import InDoubt, Rejection, RejectionReason

if TYPE_CHECKING:  # durability checks its values, and so imports the errors
    from reliamq.spi.durability import Finding

__all__ = [
    "BrokenPlugin",
    "BrokerUnavailable",
    "ConfigurationError",
    "DeliveryError",
    "DuplicateHandler",
    "DurabilityError",
    "HandlerSignatureError",
    "InvalidMessage",
    "LeaseLost",
    "MissingExtra",
    "NotSupported",
    "OutboxError",
    "PublishError",
    "Rejected",
    "ReliamqError",
    "StorageFull",
    "StoreUnavailable",
    "TooLarge",
    "TransactionRequired",
    "Unconfirmed",
    "Undecodable",
    "UnknownScheme",
    "Unroutable",
    "publish_error",
]


class ReliamqError(Exception):
    """Everything that reliamq raises as an error."""


class ConfigurationError(ReliamqError):
    """Something was asked for wrongly; found before anything ran."""


class UnknownScheme(ConfigurationError):
    """No installed backend serves the URL's scheme."""

    def __init__(self, scheme: str, known: Sequence[str]) -> None:
        self.scheme, self.known = scheme, tuple(known)
        super().__init__(f"no backend serves '{scheme}://'; installed backends serve: {', '.join(known) or 'none'}")


class MissingExtra(ConfigurationError):
    """What is asked for is there, the client library that it needs is not.

    backend: the backend's name, or the kind of database.
    """

    def __init__(self, backend: str, module: str, install: str) -> None:
        self.backend, self.module, self.install = backend, module, install
        super().__init__(f"'{backend}' needs the module '{module}', which is not installed; run: {install}")


class BrokenPlugin(ConfigurationError):
    """An installed plugin cannot be used: it fails to import or does not keep to the hook specification."""

    def __init__(self, plugin: str, fault: str) -> None:
        self.plugin, self.fault = plugin, fault
        super().__init__(f"plugin '{plugin}' is broken: {fault}")


class HandlerSignatureError(ConfigurationError):
    """A handler's parameter cannot be filled, or it is no function that can be run; raised when it is registered.

    parameter: which one; None: the function as a whole.
    """

    def __init__(self, handler: str, parameter: str | None, fault: str) -> None:
        self.handler, self.parameter, self.fault = handler, parameter, fault
        subject = "it" if parameter is None else f"parameter '{parameter}'"
        super().__init__(f"handler {handler}: {subject} {fault}")


class DuplicateHandler(ConfigurationError):
    """Two handlers claim the same message type in one group."""

    def __init__(self, topic: str, group: str, message_type: str, first: str, second: str) -> None:
        self.topic, self.group, self.message_type = topic, group, message_type
        super().__init__(
            f"topic '{topic}', group '{group}': type '{message_type}' is handled by {first} and again by {second}; "
            "give the second its own group, or one of them another type"
        )


class DurabilityError(ReliamqError):
    """The live broker falls short of the durability that is required (S3)."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        lines = "\n".join(f"  - {finding}" for finding in findings)
        super().__init__(f"the broker would lose messages as it is configured:\n{lines}")

    @property
    def passing(self) -> bool:
        """Whether all of it passes by itself as a rule, so that it is worth waiting for."""
        return all(finding.passing for finding in self.findings)


class PublishError(ReliamqError):
    """A message was not confirmed.

    topic, message_id: which one.
    """

    def __init__(self, topic: str, message_id: str, detail: str) -> None:
        self.topic, self.message_id, self.detail = topic, message_id, detail
        super().__init__(f"message {message_id} to topic '{topic}': {detail}")


class Rejected(PublishError):
    """Certainly not stored: it may be forgotten or put right."""


class Unroutable(Rejected):
    """No topic of the name, or no group that would receive the message (P3)."""


class TooLarge(Rejected):
    """Over the size limit (P6)."""


class InvalidMessage(Rejected):
    """The message is malformed: its body does not validate, its key is neither text nor bytes, the broker says so."""


class StorageFull(Rejected):
    """The broker has no room."""


class Unconfirmed(PublishError):
    """May be stored: repeat it with the same id, never drop it."""


class DeliveryError(ReliamqError):
    """Something is wrong with a delivery.

    group, message_id: which one.
    """

    def __init__(self, group: str, message_id: str, detail: str) -> None:
        self.group, self.message_id, self.detail = group, message_id, detail
        super().__init__(f"message {message_id} in group '{group}': {detail}")


class LeaseLost(DeliveryError):
    """Its lease ran out and somebody else may own it now; what this owner settles changes nothing (C12)."""


class Undecodable(DeliveryError):
    """Its bytes are not what the topic declares; dead-lettered at once (C11)."""


class OutboxError(ReliamqError):
    """The outbox was used in a way that could not keep its promise."""


class TransactionRequired(OutboxError):
    """A row was to be added outside a transaction, so that it would not share the business change's fate (O1)."""


class NotSupported(ReliamqError):
    """The broker cannot do this.  (``NotImplementedError``: its author has not done it yet.)"""


class BrokerUnavailable(ReliamqError):
    """The broker could not be reached or opened; nothing was tried, so waiting and repeating is safe.

    url: which, with secrets masked.
    """

    def __init__(self, url: str, detail: str) -> None:
        self.url, self.detail = url, detail
        super().__init__(f"{url}: {detail}")


class StoreUnavailable(ReliamqError):
    """Where leases or locks are kept cannot be reached, or does not keep them as safely as it must.

    What was asked may have been done: a lease that was granted so runs out by itself, and asking again is safe.
    url: which, with secrets masked.
    """

    def __init__(self, url: str, detail: str) -> None:
        self.url, self.detail = url, detail
        super().__init__(f"{url}: {detail}")


_BY_REASON: dict[RejectionReason, type[Rejected]] = {
    RejectionReason.UNROUTABLE: Unroutable,
    RejectionReason.TOO_LARGE: TooLarge,
    RejectionReason.INVALID: InvalidMessage,
    RejectionReason.STORAGE_FULL: StorageFull,
}


def publish_error(topic: str, outcome: Rejection | InDoubt) -> PublishError:
    """The exception that says to a single caller what ``outcome`` says as a value (P2)."""
    kind = _BY_REASON.get(outcome.reason, Rejected) if isinstance(outcome, Rejection) else Unconfirmed
    error = kind(topic, outcome.message_id, outcome.detail)
    error.__cause__ = outcome.cause
    return error
