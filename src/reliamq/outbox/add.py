"""Adding messages to the outbox inside the user's own transaction, with SQLAlchemy's sessions (O1).

No broker is asked; what could never be sent is refused here, where the user's transaction can still be rolled back.
For keyed messages, positions are handed out in commit order, so that a relay sends them in the order in which they
became true (O3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import BaseModel
from sqlalchemy import BigInteger, BindParameter, ColumnElement, Connection, MetaData, TypeDecorator, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, class_mapper, object_session

from reliamq.outbox.connections import need_transaction, refuse_autocommit
from reliamq.outbox.key_locks import check_locked, key_locks, lock_number, locked_position
from reliamq.outbox.table import OutboxMessage, columns_of
from reliamq.outbox.waking import wake_relays
from reliamq.spi import Message
from reliamq.spi.messages import NO_HEADERS
from reliamq.topics import Topic

__all__ = ["add", "add_all"]

M = TypeVar("M", bound=BaseModel)
HAS_ADDED = "reliamq_has_added"
"""In a session's ``info``: that it has flushed messages since its last commit."""


class _Position(TypeDecorator[int]):
    """In an INSERT, a position that is drawn when the key is locked whose number it is given (PostgreSQL).

    As a type it is part of the statement, so that SQLAlchemy finds the compiled one again; as a value of the row it
    would be compiled anew each time.
    """

    impl = BigInteger
    cache_ok = True

    def bind_expression(self, bindparam: BindParameter[int]) -> ColumnElement[int]:
        return locked_position(bindparam)


_new_rows = OutboxMessage.metadata.tables[OutboxMessage.__tablename__].to_metadata(MetaData())
_new_rows.c.position.type = _Position()


class _NewMessage(OutboxMessage):
    """A message while it is added: known by its id, so that nobody asks which position it got.

    position: the number of its key's lock, on PostgreSQL; or None.  It is not the one in the table, also afterwards.
    locked: the keys of its flush are.
    """

    locked = False
    __table__ = _new_rows
    __mapper_args__ = {"concrete": True, "primary_key": [_new_rows.c.message_id], "eager_defaults": False}  # noqa: RUF012


# In a flush, tables that have nothing to do with each other come in the order of this name, else the module's.  Last, a
# key is locked after the rows that its message is about, as it is where those came in an earlier flush
class_mapper(OutboxMessage)._sort_key = "~"


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
    plain.add_all([_NewMessage(**columns_of(message)) for message in messages])


@event.listens_for(_NewMessage, "before_insert")
def _before_insert(_mapper: object, connection: Connection, message: _NewMessage) -> None:
    """Before the first message of a flush is inserted, the keys of all of them are locked until the end of the
    transaction.

    When it is the messages' turn in the flush, and not before: a lock that is part of the INSERT comes then, too, so
    that whoever changes a row and adds a message of its key takes both in the same order.
    """
    session = object_session(message)
    if message.locked or session is None:
        return
    refuse_autocommit(connection.get_execution_options(), connection.dialect)
    need_transaction(connection.connection.driver_connection, of_sqlalchemy=True)
    session.info[HAS_ADDED] = True
    _lock(connection, [one for one in session.new if isinstance(one, _NewMessage)])


def _lock(connection: Connection, added: Sequence[_NewMessage]) -> None:
    for one in added:
        one.locked = True
    numbers = {lock_number(one.topic, one.key) for one in added if one.key is not None}
    if len(added) == 1 and numbers and connection.dialect.name == "postgresql":
        (added[0].position,) = numbers  # the lock is part of the INSERT: it spares a round trip
        return
    for lock in key_locks(numbers, connection.dialect):
        check_locked(len(connection.execute(lock).all()))


# On all sessions: to listen on each one would cost half of what an INSERT does
@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    """Also of a savepoint, when nobody can see it yet."""
    if session.info.get(HAS_ADDED) and not session.in_nested_transaction():
        del session.info[HAS_ADDED]
        wake_relays()
