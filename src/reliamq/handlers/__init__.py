"""Handlers: what a user's function declares, read once at registration.

A signature is compiled to a plan, so that every mistake is found at import and nothing is looked up per message.  Retry
policies and the two signals that a handler may raise live here too.  Running a handler is left to
``reliamq.consuming``.
"""

from reliamq.handlers.backoff import Backoff as Backoff
from reliamq.handlers.plan import Effects as Effects, Handler as Handler, Providers as Providers
from reliamq.handlers.signals import DeadLetter as DeadLetter, RetryAfter as RetryAfter
