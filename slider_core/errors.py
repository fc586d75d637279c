"""The one exception users see."""


class SliderError(ValueError):
    """Bad input. The message says what was wrong, what was expected and what to do."""
