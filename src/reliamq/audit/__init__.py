"""Safe shelter, checked: findings about the live settings, shown so that somebody can act on them (S2)."""

from reliamq.audit.database import audit_database as audit_database
from reliamq.audit.durability import audit_durability as audit_durability
from reliamq.audit.report import findings_table as findings_table, loses_messages as loses_messages, to_json as to_json
