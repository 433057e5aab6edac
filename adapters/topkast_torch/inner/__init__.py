"""The inner optimizer: what trials show of it, and how its state follows B."""
