"""Selection of A and B, the counts of their entries, and vectors over B."""
