"""The transactional outbox: messages written with the business change, sent by a relay.

``add`` joins the user's transaction and does no broker I/O (O1); the relay removes a row only on the broker's confirm
(O2), and where that is asked for keeps it for a window (O7).  For Alembic, list ``outbox.metadata`` in
``target_metadata``.
"""

from reliamq.outbox.add import add as add, add_all as add_all
from reliamq.outbox.insert import insert as insert, insert_async as insert_async
from reliamq.outbox.listening import (
    create_notify_trigger as create_notify_trigger,
    create_notify_trigger_async as create_notify_trigger_async,
    drop_notify_trigger as drop_notify_trigger,
)
from reliamq.outbox.relay import Relay as Relay
from reliamq.outbox.sql import SqlOutboxStore as SqlOutboxStore
from reliamq.outbox.table import (
    OutboxMessage as OutboxMessage,
    SentMessage as SentMessage,
    create_tables as create_tables,
    create_tables_async as create_tables_async,
    metadata as metadata,
)
from reliamq.outbox.waking import wake_relays as wake_relays
