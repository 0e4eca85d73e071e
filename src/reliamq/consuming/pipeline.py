"""One delivery, from bytes to a conclusion: choose the handler, decode, run it under its guard.

Never raises for a message: what goes wrong is a value that says what follows.  Safety is built in and not a middleware:
a user's middleware runs around the guard and can neither skip the handler nor turn a failure into an acknowledgement.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from reliamq.consuming.retry import Conclusion, GivenUp, after_crashes, after_failure, describe
from reliamq.consuming.time_limit import TimeLimit
from reliamq.handlers import Backoff, Handler
from reliamq.handlers.plan import Arguments
from reliamq.spi import Ack, Delivery, EffectGuard, ProcessedId, ReliamqError, Retry, Undecodable
from reliamq.topics import Topic

__all__ = ["Middleware", "Pipeline"]

Middleware = Callable[[Delivery, Callable[[], Awaitable[None]]], Awaitable[None]]
"""``async def middleware(delivery, call_next)``; must await ``call_next()`` once."""

logger = logging.getLogger("reliamq.consuming")
UNHANDLED = Backoff()
OUTAGE_PAUSE = timedelta(seconds=2)


class _Station:
    """One handler, ready to run."""

    __slots__ = ("arguments", "guard", "handler", "is_async", "seconds")

    def __init__(self, handler: Handler, guard: EffectGuard, arguments: Arguments) -> None:
        self.handler, self.guard, self.arguments = handler, guard, arguments
        self.seconds, self.is_async = handler.timeout.total_seconds(), handler.is_async


class Pipeline:
    """The handlers of one group on one topic, by message type.

    guards: one EffectGuard for each kind of ``effects`` that the handlers name.  providers: provided values by type.
    """

    def __init__(
        self,
        topic: Topic[Any],
        group: str,
        handlers: Sequence[Handler],
        *,
        guards: Mapping[str, EffectGuard],
        providers: Mapping[type, object],
        middleware: Sequence[Middleware] = (),
    ) -> None:
        self._topic, self._group, self._middleware = topic, group, tuple(middleware)
        self._stations = {
            handler.message_type: _Station(handler, guards[handler.effects], handler.arguments(providers))
            for handler in handlers
        }

    def timeout(self, delivery: Delivery) -> float | None:
        """Seconds that one attempt may take; None where no handler is chosen."""
        station = self._stations.get(delivery.message.type)
        return None if station is None else station.seconds

    def verdict_on_crashes(self, delivery: Delivery) -> Conclusion | None:
        """A conclusion without another start, for a message that killed its process too often (C4)."""
        policy, name = self._policy_of(delivery)
        return after_crashes(delivery, policy, handler=name)

    async def conclude(self, delivery: Delivery, limit: TimeLimit) -> Conclusion:
        """Run one attempt and say what follows.  Cancelled: the guard rolled back; nothing is concluded.

        limit: is told when the effect starts and ends.
        """
        message = delivery.message
        if message.only_group is not None and message.only_group != self._group:
            return Ack(delivery)  # addressed to another group, on a broker that cannot deliver to one alone
        station = self._stations.get(message.type)
        if station is None:
            return self._unhandled(delivery)
        try:
            model = self._topic.decode(message)
            if self._middleware:
                await self._run_around(station, model, delivery, limit)
            else:
                await self._run(station, model, delivery, limit)
        except Exception as error:
            return self.failed(delivery, error)
        except (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # sys.exit() in a handler ends its attempt, not the process with its neighbours
            return self.failed(delivery, RuntimeError(f"the handler raised {error!r}"))
        return Ack(delivery)

    def timed_out(self, delivery: Delivery, limit: TimeLimit) -> Conclusion:
        """What follows when an attempt was stopped at its timeout (C7)."""
        if limit.in_effect:
            return self.failed(delivery, TimeoutError(f"the handler took longer than {self.timeout(delivery)} s"))
        why = "its effect could not start, or not be committed, in time: the database, the lease store or a thread"
        logger.warning("message %s, group %s: %s", delivery.message.id, self._group, why)
        return Retry(delivery, OUTAGE_PAUSE, keep_order=True, counts=False, reason=why)

    def failed(self, delivery: Delivery, error: Exception) -> Conclusion:
        """What follows when an attempt ended with ``error``."""
        policy, name = self._policy_of(delivery)
        conclusion = after_failure(delivery, error, policy, handler=name)
        logger.warning(
            "message %s, topic %s, group %s, attempt %d: %s; next: %s",
            delivery.message.id,
            delivery.message.topic,
            self._group,
            delivery.attempt,
            describe(error),
            _in_words(conclusion),
            exc_info=error if logger.isEnabledFor(logging.DEBUG) else None,
        )
        return conclusion

    def _policy_of(self, delivery: Delivery) -> tuple[Backoff, str]:
        """The retry policy that counts, and the name of the handler; of no handler, the defaults."""
        station = self._stations.get(delivery.message.type)
        return (station.handler.retry, station.handler.name) if station else (UNHANDLED, "")

    async def _run(self, station: _Station, model: BaseModel, delivery: Delivery, limit: TimeLimit) -> None:
        handler, function = station.handler, station.handler.function
        identity = ProcessedId(self._topic.name, self._group, handler.name, delivery.message.id)
        if station.is_async:

            async def effect(resource: Any) -> None:
                limit.effect_starts()
                try:
                    await function(**station.arguments(model, delivery, resource))
                finally:
                    limit.effect_ends()

            await station.guard.apply(identity, effect)
        else:
            on_loop = asyncio.get_running_loop().call_soon_threadsafe

            def plain_effect(resource: Any) -> None:
                on_loop(limit.effect_starts)
                try:
                    _refuse_unfinished(function(**station.arguments(model, delivery, resource)))
                finally:
                    on_loop(limit.effect_ends)

            await station.guard.apply_in_thread(identity, plain_effect)

    async def _run_around(self, station: _Station, model: BaseModel, delivery: Delivery, limit: TimeLimit) -> None:
        """Run under the middleware, outermost first; whatever they do, the handler's own fate counts."""
        fate: list[Exception | None] = []

        async def innermost() -> None:
            try:
                await self._run(station, model, delivery, limit)
            except Exception as error:
                fate[:] = [error]
                raise
            fate[:] = [None]

        call: Callable[[], Awaitable[None]] = innermost
        for middleware in reversed(self._middleware):
            call = _around(middleware, delivery, call)
        await call()
        if not fate:
            raise ReliamqError("a middleware returned without awaiting call_next(), so the handler did not run")
        if fate[0] is not None:
            raise fate[0]  # a middleware swallowed it; that must not acknowledge the message

    def _unhandled(self, delivery: Delivery) -> Conclusion:
        if not delivery.message.type:
            foreign = "it does not say what it is (attribute 'type'); it was not written by reliamq"
            return self.failed(delivery, Undecodable(self._group, delivery.message.id, foreign))
        # During a rolling deployment an old worker meets a new type: waiting for a new worker beats giving up at once.
        known = "the topic knows it" if self._topic.knows(delivery.message.type) else "the topic does not know it"
        error = ReliamqError(f"group '{self._group}' has no handler for type '{delivery.message.type}' ({known})")
        return self.failed(delivery, error)


def _refuse_unfinished(result: object) -> None:
    """A plain function that hands back a coroutine or a generator has not run yet: that must not acknowledge."""
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(f"the handler returned a {type(result).__name__} instead of doing its work; make it async def")


def _in_words(conclusion: Conclusion) -> str:
    match conclusion:
        case GivenUp():
            return "dead letter"
        case Retry(delay=delay):
            return f"again in {delay.total_seconds():.1f} s"
        case _:
            return type(conclusion).__name__.lower()


def _around(
    middleware: Middleware, delivery: Delivery, inner: Callable[[], Awaitable[None]]
) -> Callable[[], Awaitable[None]]:
    async def call() -> None:
        await middleware(delivery, inner)

    return call
