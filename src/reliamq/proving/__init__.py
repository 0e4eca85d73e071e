"""The prover: runs orders through the real pipeline, kills its processes, and counts every message at the other end.

A check that cannot fail proves nothing, so rules can be broken on purpose and the checker must catch each.
"""
