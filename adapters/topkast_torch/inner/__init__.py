"""The inner optimizer: what trials find about it, and how its state follows B."""
