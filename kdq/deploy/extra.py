"""The packages of ``kdq[deploy]``: asked for when they are needed, with one line where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from kdq.utils.errors import KdqError


def needs(*packages: str) -> None:
    """Raises KdqError if one of ``packages`` is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise KdqError(f"{', '.join(missing)} not installed: pip install 'kdq[deploy]'")
