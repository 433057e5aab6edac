"""Layers whose weight exists on B alone, and the way there and back."""
