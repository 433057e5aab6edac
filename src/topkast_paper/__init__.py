"""The paper's experiments at their own size; ``import topkast`` never imports this package."""


class PaperError(Exception):
    """A user error, described in one line."""
