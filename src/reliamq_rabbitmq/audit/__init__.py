"""What the live cluster is like, and what of it can lose messages."""
