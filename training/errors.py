"""The exception for errors that the user can fix."""


class TrainingError(Exception):
    """Printed without traceback. The message says what was wrong, what was expected and what to do."""
