"""The one exception a user is meant to read."""


class KdqError(Exception):
    """Something the user can mend. Its text is one line that says what is wrong and what to do."""


def no_module(error: ModuleNotFoundError) -> str:
    """One line for a module that a config names and Python does not find."""
    return f"there is no module {error.name}; if it is yours, say where: PYTHONPATH=FOLDER kdq ..."
