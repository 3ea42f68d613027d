"""Checks of options, each with one line that says what is allowed."""

import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from kdq.utils.errors import KdqError

_WORDS = {int: "a whole number", float: "a number", str: "a name", bool: "true or false", list: "a list"}
#: What 32-bit whole numbers reach, in which torch and NumPy count many things.
LARGEST = 2**31 - 1


def within(option: str, value: float, low: float, high: float = math.inf) -> float:
    """``value``, refused unless it is a number from ``low`` to ``high``; ``option`` is its name for people.

    >>> within("method.alpha", 0.9, 0, 1)
    0.9
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise KdqError(f"{option}={value!r} must be a number {allowed}")
    return value


def flag(option: str, value: bool) -> bool:
    """``value``, refused unless it is true or false.

    >>> flag("method.standardize", True)
    True
    """
    check_type(option, value, bool)
    return value


def one_of(option: str, value: Any, known: Iterable[Any]) -> Any:
    """``value``, refused unless it is one of ``known``."""
    choices = list(known)
    if value not in choices:
        listed = ", ".join("null" if choice is None else str(choice) for choice in choices)
        raise KdqError(f"{option}={value!r} is unknown: use one of {listed}{nearest(value, choices)}")
    return value


def check_types(instance: Any, prefix: str) -> None:
    """The fields of a dataclass hold what their annotations say; see :func:`check_type`."""
    hints = get_type_hints(type(instance))
    for field in fields(instance):
        check_type(f"{prefix}{field.name}", getattr(instance, field.name), hints[field.name])


def check_type(option: str, value: Any, hint: Any) -> None:
    """Refuse a ``value`` that is not what ``hint`` says, or a number that is not finite or fits no tensor. Hints other
    than plain types, ``None`` and lists of them are not looked at.

    >>> check_type("data.mean", [0.5], list[float] | None)
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = [get_origin(option) or option for option in options]
    if not all(option in _WORDS or option is type(None) for option in plain):
        return
    taken = (*plain, *((int,) if float in plain else ()))
    wrong_bool = isinstance(value, bool) and bool not in plain
    if wrong_bool or not isinstance(value, taken):
        words = " or ".join("null" if option is type(None) else _WORDS[option] for option in plain)
        raise KdqError(f"{option}={value!r} must be {words}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise KdqError(f"{option}={value!r} is too large: the largest whole number is {LARGEST}")
    if isinstance(value, float) and not math.isfinite(value):
        raise KdqError(f"{option}={value!r} must be a finite number")
    if isinstance(value, list):
        (inner,) = next(get_args(each) for each in options if get_origin(each) is list)
        for number, entry in enumerate(value):
            check_type(f"{option}[{number}]", entry, inner)


def nearest(name: Any, options: Iterable[Any]) -> str:
    """`` (did you mean X?)`` where an option is close to ``name``, else nothing."""
    near = difflib.get_close_matches(str(name), [str(option) for option in options], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def is_peer(name: str) -> bool:
    """Whether an option names a network that learns beside the student: ``peer``, ``peer2`` and so on.

    >>> [name for name in ("peer", "peer2", "peers", "peer_weight") if is_peer(name)]
    ['peer', 'peer2']
    """
    return name.rstrip("0123456789") == "peer"
