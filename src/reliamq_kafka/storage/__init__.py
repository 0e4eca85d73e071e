"""Safe shelter: declaring topics and groups, and removing what every group has finished."""
