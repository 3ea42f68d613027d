"""Options of a method, declared as attributes of its class: the default, and what else is allowed.

The base takes them as keyword arguments, keeps them as attributes and hyper-parameters, and refuses other values.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kdq.utils.checks import check_type, flag, one_of, within


class Option(NamedTuple):
    """A default, and what checks a value: ``check(name, value)`` returns it or raises a KdqError."""

    default: Any
    check: Callable[[str, Any], Any]


def number(default: float, low: float = 0.0, high: float = math.inf) -> Any:
    """A number from ``low`` to ``high``.

    >>> number(0.9, high=1).default
    0.9
    """
    return Option(default, lambda name, value: within(name, value, low, high))


def count(default: int) -> Any:
    """A whole number of at least 1."""

    def check(name: str, value: Any) -> int:
        check_type(name, value, int)
        return int(within(name, value, 1))

    return Option(default, check)


def switch(default: bool = False) -> Any:
    """True or false."""
    return Option(default, flag)


def choice(default: str, *others: str) -> Any:
    """One of some words."""
    return Option(default, lambda name, value: one_of(name, value, (default, *others)))


def layer_names() -> Any:
    """Names of layers, or None; whoever has the network checks them."""
    return Option(None, lambda name, value: value)


def options_of(method: type) -> dict[str, Option]:
    """The options of a class, then those of its bases, by name; where both have one, the class's. A plain value in a
    class is another default for the option of its bases.

    >>> class Base:
    ...     alpha = number(0.9, high=1)
    >>> class Mine(Base):
    ...     alpha = 0.5
    >>> options_of(Mine)["alpha"].default
    0.5
    """
    found: dict[str, Option] = {}
    plain: dict[str, Any] = {}
    for base in method.__mro__:
        for name, value in vars(base).items():
            if not isinstance(value, Option):
                plain.setdefault(name, value)
            elif name not in found:
                default = plain.get(name, value.default)
                found[name] = value if hasattr(default, "__get__") else value._replace(default=default)
    return found
