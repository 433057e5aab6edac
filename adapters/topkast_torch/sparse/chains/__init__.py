"""Sparse layers in a row or with the same input, which run together on packed activations."""
