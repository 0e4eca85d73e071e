"""All that a backend author reads and may import.

Read in this order: messages, outcomes, contracts, stores; then durability, capabilities, errors, watermark, window,
hooks.
Importing it loads pluggy and the standard library, nothing heavier.
"""

from reliamq.spi.capabilities import Capabilities as Capabilities
from reliamq.spi.contracts import (
    Backend as Backend,
    DeadLetterRecord as DeadLetterRecord,
    DeadLetters as DeadLetters,
    Publisher as Publisher,
    Storage as Storage,
    Subscription as Subscription,
)
from reliamq.spi.durability import (
    Durability as Durability,
    Finding as Finding,
    GroupSpec as GroupSpec,
    Severity as Severity,
    TopicSpec as TopicSpec,
)
from reliamq.spi.errors import (
    BrokenPlugin as BrokenPlugin,
    BrokerUnavailable as BrokerUnavailable,
    ConfigurationError as ConfigurationError,
    DeliveryError as DeliveryError,
    DuplicateHandler as DuplicateHandler,
    DurabilityError as DurabilityError,
    HandlerSignatureError as HandlerSignatureError,
    InvalidMessage as InvalidMessage,
    LeaseLost as LeaseLost,
    MissingExtra as MissingExtra,
    NotSupported as NotSupported,
    OutboxError as OutboxError,
    PublishError as PublishError,
    Rejected as Rejected,
    ReliamqError as ReliamqError,
    StorageFull as StorageFull,
    StoreUnavailable as StoreUnavailable,
    TooLarge as TooLarge,
    TransactionRequired as TransactionRequired,
    Unconfirmed as Unconfirmed,
    Undecodable as Undecodable,
    UnknownScheme as UnknownScheme,
    Unroutable as Unroutable,
    publish_error as publish_error,
)
from reliamq.spi.hooks import (
    ENTRY_POINT_GROUP as ENTRY_POINT_GROUP,
    WORKER_NUMBER as WORKER_NUMBER,
    BackendHooks as BackendHooks,
    hookimpl as hookimpl,
    hookspec as hookspec,
)
from reliamq.spi.messages import (
    Delivery as Delivery,
    Message as Message,
    cloudevent_attributes as cloudevent_attributes,
    message_from_attributes as message_from_attributes,
    rfc3339 as rfc3339,
)
from reliamq.spi.outcomes import (
    Ack as Ack,
    Confirmation as Confirmation,
    InDoubt as InDoubt,
    Outcome as Outcome,
    Rejection as Rejection,
    RejectionReason as RejectionReason,
    Release as Release,
    Retry as Retry,
    Settlement as Settlement,
)
from reliamq.spi.stores import (
    CLAIM_BYTES as CLAIM_BYTES,
    DistributedLock as DistributedLock,
    EffectBusy as EffectBusy,
    EffectGuard as EffectGuard,
    FencingToken as FencingToken,
    IdempotencyStore as IdempotencyStore,
    KeptTopic as KeptTopic,
    KeptWindow as KeptWindow,
    LeaseGrant as LeaseGrant,
    Leases as Leases,
    LeaseState as LeaseState,
    OutboxRow as OutboxRow,
    OutboxStatus as OutboxStatus,
    OutboxStore as OutboxStore,
    ParkedRow as ParkedRow,
    ProcessedId as ProcessedId,
)
from reliamq.spi.watermark import Watermark as Watermark
from reliamq.spi.window import Entry as Entry, Room as Room, Window as Window
