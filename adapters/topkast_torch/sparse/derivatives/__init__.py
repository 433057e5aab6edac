"""Derivatives of sparse products: what they are products of, and gradients as functions."""
