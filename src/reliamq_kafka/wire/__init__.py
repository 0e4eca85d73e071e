"""How reliamq talks to a cluster: connecting, asking, reading and writing, and what is written."""
