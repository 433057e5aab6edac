"""The paper's studies, which ``python -m topkast study`` runs; ``import topkast`` never does."""


class StudyError(Exception):
    """A user error, described in one line."""
