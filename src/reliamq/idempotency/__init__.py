"""Idempotence: a message takes effect once for each handler of each group, however often it is delivered (I1–I5).

Three guards, one for each kind of ``effects=``; stores for leases; locks; optimistic-lock retries; and the clean-up of
marks.
"""

from reliamq.idempotency.cleaning import check_window as check_window, run_cleaning as run_cleaning
from reliamq.idempotency.lease import LeaseGuard as LeaseGuard, RepeatableGuard as RepeatableGuard
from reliamq.idempotency.locks import SqlLock as SqlLock
from reliamq.idempotency.memory import MemoryLeaseStore as MemoryLeaseStore
from reliamq.idempotency.sql_lease import SqlLeaseStore as SqlLeaseStore
from reliamq.idempotency.tables import (
    create_tables as create_tables,
    create_tables_async as create_tables_async,
    metadata as metadata,
)
from reliamq.idempotency.transaction import TransactionGuard as TransactionGuard
from reliamq.idempotency.versions import is_conflict as is_conflict, retry_on_conflict as retry_on_conflict
