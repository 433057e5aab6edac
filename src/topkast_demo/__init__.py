"""What ``python -m topkast demo`` runs; never imported by ``import topkast``."""


class DemoError(Exception):
    """A mistake of the user, told in one line."""
