"""The error class of the pack."""


class SliderError(ValueError):
    """An error that the user can fix. The message states what was wrong, what was expected and what to do."""
