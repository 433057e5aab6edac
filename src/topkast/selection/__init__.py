"""Which entries are in A and B: how they are ranked and counted, and vectors over B."""
