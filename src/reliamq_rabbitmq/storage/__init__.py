"""Safe shelter: declaring topics and groups."""
