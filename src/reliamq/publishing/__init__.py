"""Safe departure: every caller gets its own message's outcome, and many callers share one batch."""

from reliamq.publishing.publisher import ConfirmingPublisher as ConfirmingPublisher
