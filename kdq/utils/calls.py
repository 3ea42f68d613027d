"""What a config calls: the functions and classes that it names by their dotted path."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import hydra.utils

from kdq.utils.errors import KdqError, message, no_module

T = TypeVar("T")


def parts(config: Any) -> Iterator[Any]:
    """A config and everything in it.

    >>> list(parts({"net": [20]}))
    [{'net': [20]}, [20], 20]
    """
    yield config
    inside = config.values() if isinstance(config, Mapping) else config if isinstance(config, (list, tuple)) else ()
    for part in inside:
        yield from parts(part)


def called(config: Any) -> Iterator[str]:
    """The dotted path of everything that a config calls: a ``_target_``, and a ``path`` beside one."""
    for node in parts(config):
        if isinstance(node, Mapping) and "_target_" in node:
            yield from (str(node[key]) for key in ("_target_", "path") if node.get(key) is not None)


def imported(option: str, path: Any) -> Any:
    """The object at the dotted ``path`` that ``option`` names, or a KdqError that says why there is none."""
    if not isinstance(path, str):
        raise KdqError(f"{option}._target_={path} names nothing: give the path of a class or function, package.Name")
    try:
        return hydra.utils.get_object(path)
    except Exception as error:
        cause = error.__cause__ or error
        why = no_module(cause) if isinstance(cause, ModuleNotFoundError) else message(cause)
        raise KdqError(f"{option}: cannot import {path!r}: {why}") from error


def made(option: str, config: Mapping[str, Any], kind: type[T]) -> T:
    """What ``config``, the value of ``option``, makes; refused unless it is an instance of ``kind``."""
    try:
        found = hydra.utils.instantiate(config)
    except Exception as error:
        raise KdqError(f"{option}: {message(error.__cause__ or error)}") from error
    if not isinstance(found, kind):
        raise KdqError(f"{option} is no Lightning {kind.__name__.lower()}: give it a _target_ that makes one")
    return found


def parameters(function: Any) -> list[str] | None:
    """The names that a callable takes, those that a class passes on to its bases among them; None: any.

    >>> parameters(parts)
    ['config']
    """
    if isinstance(signature := getattr(function, "__signature__", None), inspect.Signature):
        return list(signature.parameters)
    bases = [vars(base)["__init__"] for base in getattr(function, "__mro__", ()) if "__init__" in vars(base)]
    names: list[str] = []
    for each in bases or [function]:
        try:
            taken = inspect.signature(each).parameters.values()
        except (TypeError, ValueError):  # written in C
            return None
        names += [p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if all(p.kind != p.VAR_KEYWORD for p in taken):
            return [name for name in dict.fromkeys(names) if name != "self"]
    return None
