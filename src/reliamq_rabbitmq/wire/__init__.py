"""How reliamq talks to a cluster: connecting, publishing, consuming, and what is written."""
