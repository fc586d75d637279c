"""What a person can mend, as one message."""


class TrainingError(Exception):
    """Says what was wrong, what was expected and what to do."""
