"""Adding messages to the outbox inside the user's own transaction, with SQLAlchemy's sessions (O1).

No broker is asked; what could never be sent is refused here, where the user's transaction can still be rolled back.
For keyed messages, positions are handed out in commit order, so that a relay sends them in the order in which they
became true (O3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, object_session

from reliamq.outbox.connections import need_transaction, refuse_autocommit
from reliamq.outbox.key_locks import check_locked, key_locks, lock_number, locked_position
from reliamq.outbox.table import OutboxMessage, columns_of
from reliamq.outbox.waking import wake_relays
from reliamq.spi import Message
from reliamq.spi.messages import NO_HEADERS
from reliamq.topics import Topic

__all__ = ["add", "add_all"]

M = TypeVar("M", bound=BaseModel)
ADDS = "reliamq_adds"
"""In a session's ``info``: that messages are added to it."""
HAS_ADDED = "reliamq_has_added"
"""There: that it has flushed messages since its last commit."""
TO_LOCK = "reliamq_to_lock"
"""There, during a flush: the keys whose messages it will insert."""


def add(
    session: Session | AsyncSession,
    topic: Topic[M],
    model: M,
    *,
    id: str | None = None,  # the field's name in CloudEvents
    headers: Mapping[str, str] = NO_HEADERS,
) -> str:
    """Add ``model`` to the session as a message for ``topic``; it commits or rolls back with everything else in it
    (O1).

    No I/O happens here.  Returns the message's id.
    Raises InvalidMessage and TooLarge as :meth:`reliamq.topics.Topic.message` does; TransactionRequired on a session
    that commits each statement by itself.
    """
    message = topic.message(model, id=id, headers=headers)
    _add(session, [message])
    return message.id


def add_all(
    session: Session | AsyncSession,
    topic: Topic[M],
    models: Iterable[M],
    *,
    headers: Mapping[str, str] = NO_HEADERS,
) -> Sequence[str]:
    """The same for many models, in their order; their ids.  If one cannot be sent, none is added.

    headers: of each.
    """
    messages = [topic.message(model, headers=headers) for model in models]
    _add(session, messages)
    return [message.id for message in messages]


def _add(session: Session | AsyncSession, messages: Sequence[Message]) -> None:
    plain = session.sync_session if isinstance(session, AsyncSession) else session
    bind = plain.get_bind(OutboxMessage)
    refuse_autocommit(bind.get_execution_options(), bind.dialect)
    plain.info[ADDS] = True
    plain.add_all([OutboxMessage(**columns_of(message)) for message in messages])


# On all sessions: to listen on each one would cost half of what an INSERT does.
@event.listens_for(Session, "before_flush")
def _before_flush(session: Session, _context: object, _instances: object) -> None:
    """Before positions are drawn, each key is locked until the end of the transaction."""
    if ADDS not in session.info:
        return
    added = [one for one in session.new if isinstance(one, OutboxMessage)]
    if not added:
        return
    ours = {"mapper": OutboxMessage}  # a session may have several databases
    connection = session.connection(bind_arguments=ours)
    refuse_autocommit(connection.get_execution_options(), connection.dialect)
    need_transaction(connection.connection.driver_connection, of_sqlalchemy=True)
    numbers = {lock_number(one.topic, one.key): one for one in added if one.key is not None}
    if len(added) == 1 and numbers and connection.dialect.name == "postgresql":
        ((number, alone),) = numbers.items()
        alone.position = locked_position(number)  # a value in SQL: it spares a round trip
        numbers = {}
    session.info[TO_LOCK] = numbers.keys()
    session.info[HAS_ADDED] = True


@event.listens_for(OutboxMessage, "before_insert")
def _before_insert(_mapper: object, connection: Connection, message: OutboxMessage) -> None:
    """When it is the messages' turn in the flush, and not before: a lock that is part of the INSERT comes then, too, so
    that whoever changes a row and adds a message of its key takes both in the same order.
    """
    session = object_session(message)
    numbers = () if session is None else session.info.pop(TO_LOCK, ())
    for lock in key_locks(numbers, connection.dialect):
        check_locked(len(connection.execute(lock).all()))


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    """Also of a savepoint, when nobody can see it yet."""
    if session.info.get(HAS_ADDED) and not session.in_nested_transaction():
        del session.info[HAS_ADDED]
        wake_relays()
