"""Safe shelter: declaring, and removing what every group has finished."""
