"""Safe arrival: one member of one group on one topic."""
