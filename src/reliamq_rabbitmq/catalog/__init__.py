"""What reliamq keeps on a cluster: how its queues are named and made, facts of topics, dead letters."""
