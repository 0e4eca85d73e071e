"""The application object and its life: open, publish, work, relay, close.

``async with app`` connects, declares what must exist, audits it and opens the publisher; leaving drains and closes in
reverse.  A broker that falls short of the required durability is refused before a message is trusted to it (S3).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar

import anyio
from pydantic import BaseModel

from reliamq.app.departure import check_keep, open_publisher
from reliamq.app.guards import Guards, check_effects, open_guards
from reliamq.app.leases import check_kept, open_locks
from reliamq.app.lifespan import check_lifespan, lifespan_of
from reliamq.app.locks import DEFAULT_LEASE, check_lock
from reliamq.app.registry import DEFAULT_TIMEOUT, GroupKey, Registry
from reliamq.app.waiting import once_there
from reliamq.backends import open_backend
from reliamq.consuming import DeadLetterDesk, GroupMember, Middleware, Pipeline
from reliamq.consuming.member import Limits
from reliamq.consuming.suspects import Suspects
from reliamq.handlers import Backoff, Effects
from reliamq.publishing import ConfirmingPublisher
from reliamq.settings import Settings, masked
from reliamq.spi import (
    Backend,
    ConfigurationError,
    Confirmation,
    DeadLetters,
    DistributedLock,
    Durability,
    DurabilityError,
    FencingToken,
    Finding,
    GroupSpec,
    IdempotencyStore,
    Message,
    OutboxStore,
    Severity,
    TopicSpec,
)
from reliamq.spi.arguments import check_time, need
from reliamq.topics import DEFAULT_DEADLINE, DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_RETENTION, Topic

__all__ = ["Reliamq"]

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Entered: TypeAlias = AbstractAsyncContextManager[T] | AbstractContextManager[T]
Provided: TypeAlias = T | Entered[T] | Callable[[], T | Awaitable[T] | Entered[T]]

logger = logging.getLogger("reliamq")


class Reliamq:
    """One application: its topics and handlers, and the broker and database it runs on.

    settings: None reads them from the environment and files.
    backend: a ready one instead of the one that ``settings.broker`` names; for tests and for wrapping.
    lease_store: where ``effects="lease"`` keeps its leases; None: where ``settings.leases`` says, or in the database.
    lifespan: an async context manager function, entered before and left after everything else of a run.
    Raises ConfigurationError naming what is wrong.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        backend: Backend | None = None,
        lease_store: IdempotencyStore | None = None,
        lifespan: Callable[[Reliamq], AbstractAsyncContextManager[object]] | None = None,
    ) -> None:
        wanted = "Settings, such as Settings(broker='embedded:///app.db')"
        need(settings is None or isinstance(settings, Settings), "Reliamq: settings", wanted, settings)
        check_lifespan(lifespan)
        self.settings = Settings() if settings is None else settings
        self._backend, self._lease_store, self._lifespan = backend, lease_store, lifespan
        self._registry = Registry()
        self._publisher: ConfirmingPublisher | None = None
        self._locks: DistributedLock | None = None
        self._stack: AsyncExitStack | None = None

    def __repr__(self) -> str:
        return f"<Reliamq on {masked(self.settings.broker)} with topics {', '.join(self.topics) or '(none)'}>"

    # --- declaring -------------------------------------------------------------------------------------------------

    @property
    def topics(self) -> Mapping[str, Topic[Any]]:
        """The application's topics by name."""
        return self._registry.topics

    @property
    def backend(self) -> Backend:
        """The backend that serves the broker's URL; made at first use, opens nothing."""
        if self._backend is None:
            self._backend = open_backend(self.settings.broker, self.settings.backends)
        return self._backend

    def topic(
        self,
        name: str,
        *models: type[M],
        key: Callable[[M], str | bytes | None] | None = None,
        groups: Sequence[str | GroupSpec] = (),
        durability: Durability | str | None = None,
        retention: timedelta = DEFAULT_RETENTION,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> Topic[M]:
        """Make a topic of this application; parameters as :class:`reliamq.topics.Topic` has them."""
        topic = Topic(
            name,
            *models,
            key=key,
            groups=groups,
            durability=durability,
            retention=retention,
            max_message_bytes=max_message_bytes,
            source=self.settings.source,
        )
        self.include(topic)
        return topic

    def include(self, *topics: Topic[Any]) -> None:
        """Take in topics that were made elsewhere, so that modules need not share the application."""
        self._registry.include(*topics)
        for topic in topics:
            topic.bind(self.publish)

    def handler(
        self,
        topic: Topic[Any],
        *,
        group: str,
        effects: Effects,
        concurrency: int = 16,
        timeout: timedelta = DEFAULT_TIMEOUT,
        retry: Backoff | None = None,
        name: str | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a function as the group's handler of one kind of message; it is returned unchanged.

        group: the named subscriber; each group gets every message, its members share them.
        effects: what happens when it runs twice, which only you know (I1–I3):
            ``"transaction"``: its effects are in the database; they commit together with the processed id.
            ``"lease"``: they are outside; a lease keeps others away and a fencing token tells the newest.
            ``"repeatable"``: running twice is harmless.
        concurrency: how many run at once in one process; messages of one key never do (C3).
        timeout: of one attempt (C7), from the start of the function to its end.  A plain function's thread cannot be
            stopped: it runs on beside what follows, also beside its key's next message, and its result is not used.
        retry: what follows a failure (C6).  name: identity for processed ids; the function's own name otherwise.
        Raises HandlerSignatureError, DuplicateHandler, ConfigurationError.
        """
        self.include(topic)
        return self._registry.handler(
            topic,
            group=group,
            effects=effects,
            concurrency=concurrency,
            timeout=timeout,
            retry=Backoff() if retry is None else retry,
            name=name,
        )

    def provide(self, kind: type[T], value: Provided[T]) -> None:
        """Let handlers have a parameter of type ``kind``.  Call it before the handlers that use it are registered.

        value: an instance, or a function, async or not, that makes one for the run of a worker; an (async) context
        manager is entered for it.
        """
        self._registry.provide(kind, value)

    def middleware(self, middleware: Middleware) -> Middleware:
        """Run ``async def middleware(delivery, call_next)`` around every attempt; the first registered is outermost."""
        self._registry.add_middleware(middleware)
        return middleware

    # --- life ------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Connect, declare, audit, open the publisher.  A networked broker that cannot be reached is waited for, up to
        ``start_deadline``, and so are servers of it that were restarted and are catching up.

        Raises DurabilityError with all findings (S3), BrokerUnavailable, ConfigurationError.  Cancelled: all is closed
        again.
        """
        if self._stack is not None:
            raise ConfigurationError("the application is open already")
        check_effects(self.settings, self._registry.all_handlers(), self._lease_store)
        check_keep(self.settings, self._registry.all_handlers())
        async with AsyncExitStack() as stack:
            if self._lifespan is not None:
                await stack.enter_async_context(lifespan_of(self._lifespan, self))
            patience = self.settings.start_deadline.total_seconds()
            await once_there(self.backend, self._check_shelter, patience=patience)
            if self.settings.database is not None:
                await self.create_tables()
            self._locks = await once_there(
                self.backend, lambda: stack.enter_async_context(open_locks(self.settings)), patience=patience
            )
            self._publisher = await once_there(
                self.backend,
                lambda: stack.enter_async_context(open_publisher(self.backend, self.settings.publisher)),
                patience=patience,
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Wait for outstanding confirms up to ``publisher.close_deadline`` (P7) and close everything in reverse."""
        stack, self._stack = self._stack, None
        if stack is None:
            return None
        try:
            return await stack.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            if error is not None and _only_holds(group, error):
                return False  # the block's own exception goes on as it was, not wrapped by our task group
            raise
        finally:
            self._publisher = self._locks = None

    async def _check_shelter(self) -> None:
        specs = self.specs()
        async with self.backend.storage() as storage:
            findings = dict.fromkeys([*await storage.declare(specs), *await storage.audit(specs)])
        losing = [one for one in findings if one.severity is Severity.LOSES]
        for finding in findings:
            if finding.severity is not Severity.LOSES:
                logger.warning("%s: %s", finding.severity, finding)
        if losing and self.required_durability > Durability.DEVELOPMENT:
            raise DurabilityError(losing)
        if self.required_durability is Durability.DEVELOPMENT:
            logger.warning("durability = development: messages on this broker can be lost")

    # --- shelter ---------------------------------------------------------------------------------------------------

    @property
    def required_durability(self) -> Durability:
        """What was asked for, or replicated on networked brokers, or the best that this one has (S3)."""
        capabilities = self.backend.capabilities
        if self.settings.durability is not None:
            return self.settings.durability
        return Durability.REPLICATED if capabilities.networked else capabilities.durability

    def specs(self) -> Sequence[TopicSpec]:
        """What the broker has to have."""
        return [
            topic.spec(durability=self.required_durability, groups=self._registry.groups_of(topic.name))
            for topic in self.topics.values()
        ]

    async def declare(self) -> Sequence[Finding]:
        """Create what is missing on the broker (S1)."""
        async with self.backend.storage() as storage:
            return await storage.declare(self.specs())

    async def audit(self) -> Sequence[Finding]:
        """Read the broker's live values (S2)."""
        async with self.backend.storage() as storage:
            return await storage.audit(self.specs())

    async def create_tables(self) -> None:
        """Create the tables of outbox and idempotency where they are missing; nothing existing is changed."""
        from reliamq import idempotency, outbox
        from reliamq.database import open_engine

        async with open_engine(self._database_url()) as engine:
            await outbox.create_tables_async(engine, keep=bool(self.settings.outbox.keep))
            await idempotency.create_tables_async(engine)

    def _database_url(self) -> str:
        if self.settings.database is None:
            raise ConfigurationError("no database is configured; set RELIAMQ_DATABASE or 'database' in reliamq.toml")
        return self.settings.database

    # --- departure -------------------------------------------------------------------------------------------------

    async def publish(self, message: Message, *, deadline: timedelta = DEFAULT_DEADLINE) -> Confirmation:
        """Publish an encoded message; see :meth:`reliamq.topics.Topic.publish`."""
        if deadline is not DEFAULT_DEADLINE:
            check_time(f"topic '{message.topic}': deadline", deadline)
        if self._publisher is None:
            raise ConfigurationError("the application is not open; publish inside 'async with app:'")
        return await self._publisher.publish(message, deadline=deadline)

    @asynccontextmanager
    async def outbox_store(self) -> AsyncIterator[OutboxStore]:
        """The outbox table of the configured database."""
        from reliamq.database import open_engine
        from reliamq.outbox import SqlOutboxStore

        async with open_engine(self._database_url()) as engine:
            settings = self.settings
            yield SqlOutboxStore(engine, max_attempts=settings.relay.attempts, keep=settings.outbox.keep)

    async def run_relay(self, stop: anyio.Event, *, store: OutboxStore | None = None) -> None:
        """Send what the outbox holds until ``stop`` is set (O1–O8).  store: instead of the configured database's."""
        from reliamq.outbox import Relay
        from reliamq.outbox.listening import listening

        async with AsyncExitStack() as stack:
            if store is None:
                store = await stack.enter_async_context(self.outbox_store())
            if self.settings.relay.listen:
                await stack.enter_async_context(listening(self._database_url()))
            sender = await once_there(
                self.backend, lambda: stack.enter_async_context(self.backend.publisher()), stop=stop
            )
            limits = self.settings.relay
            relay = Relay(
                store,
                sender,
                batch=limits.batch,
                batch_bytes=limits.batch_bytes,
                poll=limits.poll,
                lease=limits.lease,
                deadline=limits.deadline,
            )
            await relay.run(stop)

    # --- locks -----------------------------------------------------------------------------------------------------

    def lock(
        self, name: str, *, lease: timedelta = DEFAULT_LEASE, wait: timedelta = DEFAULT_LEASE
    ) -> AbstractAsyncContextManager[FencingToken]:
        """Keep other processes out for the block: ``async with app.lock("nightly") as token`` (I4).

        lease: how long it stays held without renewal, which happens by itself; others get it that long after a crash.
        wait: how long to wait for another holder, then TimeoutError.
        Needs ``leases`` or a database in the settings and the open application, else ConfigurationError.  When the
        lease is lost nevertheless, the block is cancelled and LeaseLost raised on leaving; hand the token to what you
        guard, so that it can refuse an older one.
        """
        check_lock(name, lease, wait)
        check_kept(self.settings, "a lock")
        if self._locks is None:
            raise ConfigurationError("the application is not open; use locks inside 'async with app:'")
        return self._locks.hold(name, lease=lease, wait=wait)

    # --- arrival ---------------------------------------------------------------------------------------------------

    async def run_worker(self, stop: anyio.Event) -> None:
        """Consume for every group that has handlers until ``stop`` is set, then finish (C8).

        Cancelled: handlers are cancelled and what is unsettled goes back to others.
        """
        if not self._registry.handlers:
            raise ConfigurationError("there is nothing to run: the application has no handlers")
        async with AsyncExitStack() as stack:
            providers = await stack.enter_async_context(self._registry.open_providers())
            handlers = self._registry.all_handlers()
            guards = await once_there(
                self.backend,
                lambda: stack.enter_async_context(open_guards(self.settings, handlers, self._lease_store)),
                stop=stop,
            )
            dead_letters = await once_there(
                self.backend, lambda: stack.enter_async_context(self.backend.dead_letters()), stop=stop
            )
            suspects = Suspects()
            members = [self._member(key, guards, providers, dead_letters, suspects) for key in self._registry.handlers]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(guards.clean_for_ever)
                async with anyio.create_task_group() as working:
                    for member in members:
                        working.start_soon(member.run, stop)
                tasks.cancel_scope.cancel()

    def _member(
        self,
        key: GroupKey,
        guards: Guards,
        providers: Mapping[type, object],
        dead_letters: DeadLetters,
        suspects: Suspects,
    ) -> GroupMember:
        topic, group = key
        limits = self.settings.worker
        pipeline = Pipeline(
            self.topics[topic],
            group,
            self._registry.handlers[key],
            guards=guards.by_effects,
            providers=providers,
            middleware=self._registry.middleware,
        )
        return GroupMember(
            self.backend.subscription(topic, group, lease=limits.lease),
            dead_letters,
            pipeline,
            concurrency=self._registry.concurrency(key),
            limits=Limits(limits.prefetch, limits.prefetch_bytes, limits.stop_deadline),
            suspects=suspects,
            label=f"topic '{topic}', group '{group}'",
        )

    @asynccontextmanager
    async def dead_letters(self) -> AsyncIterator[DeadLetterDesk]:
        """The desk for dead letters; replaying needs the application open."""
        async with self.backend.dead_letters() as dead_letters:
            yield DeadLetterDesk(dead_letters, self.publish)


def _only_holds(group: BaseExceptionGroup[BaseException], error: BaseException) -> bool:
    return all(
        one is error or (isinstance(one, BaseExceptionGroup) and _only_holds(one, error)) for one in group.exceptions
    )
