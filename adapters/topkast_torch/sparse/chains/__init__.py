"""Sparse layers in a row, whose products read and write packed activations."""
