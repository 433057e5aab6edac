"""Layers whose weight is stored on B alone, and conversion to them and back."""
