"""Safe shelter: what the live servers are really set to."""
