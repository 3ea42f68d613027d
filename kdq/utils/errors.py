"""The exceptions that a user is meant to read."""


class KdqError(Exception):
    """Something the user can mend. Its text is one line that says what is wrong and what to do."""


class StoppedTrialError(KdqError):
    """A training that its search ended, because others are better; ``value`` is what they were compared by."""

    def __init__(self, message: str, value: float) -> None:
        super().__init__(message)
        self.value = value


def message(error: BaseException) -> str:
    """What an exception says, on one line.

    >>> message(ValueError("no\\nnumber"))
    'no number'
    """
    return " ".join(str(error).split())


def one_line(error: BaseException) -> str:
    """:func:`message` in at most 300 characters, for libraries quote what they read; its type where it says nothing."""
    return (message(error) or type(error).__name__)[:300]


def no_module(error: ModuleNotFoundError) -> str:
    """One line for a module that a config names and Python does not find."""
    return f"there is no module {error.name}; if it is yours, say where: PYTHONPATH=FOLDER kdq ..."
