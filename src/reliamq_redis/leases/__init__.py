"""Leases for effects outside a database, and locks: granted, renewed, completed in one step each."""
