"""Safe arrival: receive, lanes by key, decode, idempotency, handler, settle; nothing acknowledged before its effect is
durable.
"""

from reliamq.consuming.dead_letters import DeadLetterDesk as DeadLetterDesk
from reliamq.consuming.member import GroupMember as GroupMember
from reliamq.consuming.pipeline import Middleware as Middleware, Pipeline as Pipeline
