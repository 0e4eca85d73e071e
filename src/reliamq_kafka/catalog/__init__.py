"""What reliamq keeps on a cluster beside the users' topics: declared groups, dead letters."""
