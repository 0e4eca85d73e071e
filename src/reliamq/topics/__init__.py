"""Topics: what ties a name on a broker to pydantic models, a key and a durability; model to message and back.

A topic is a plain value.  It is made free, at import, and bound to an application later, so that modules which share
topics need not share the application.  What could never be sent is refused here, before anything was stored anywhere.
"""

from reliamq.topics.kinds import type_name as type_name
from reliamq.topics.topic import (
    DEFAULT_DEADLINE as DEFAULT_DEADLINE,
    DEFAULT_MAX_MESSAGE_BYTES as DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_RETENTION as DEFAULT_RETENTION,
    Topic as Topic,
    new_message_id as new_message_id,
)
