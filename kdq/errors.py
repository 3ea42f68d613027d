"""The one exception a user is meant to read."""


class KdqError(Exception):
    """Something the user can mend. Its text is one line that says what is wrong and what to do."""
