"""Benchmarks: the raw client and reliamq side by side, in one run.  They print figures and gate nothing."""
