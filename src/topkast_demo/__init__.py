"""The demo that ``python -m topkast demo`` runs; ``import topkast`` never imports it."""


class DemoError(Exception):
    """A user error, described in one line."""
