"""Long waits, in the broker."""
