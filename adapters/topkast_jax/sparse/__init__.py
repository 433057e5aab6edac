"""Sparse execution on CPUs: products with the weights of A and B alone, inside XLA."""
