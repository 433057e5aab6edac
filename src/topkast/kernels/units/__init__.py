"""Products of matrices whose nonzero weights come in units of r × 1: r rows share a column."""
