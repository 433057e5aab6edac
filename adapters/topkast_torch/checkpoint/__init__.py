"""State dicts: what is saved, and how it is checked and loaded."""
