"""From an exception to the one line a user reads."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
import tempfile
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdq.utils.config import compose
from kdq.utils.errors import KdqError, no_module

#: Choices that plugins of Hydra bring, and the extra of kdq that installs each.
_PLUGINS = {"hydra/sweeper=optuna": "optuna", "hydra/launcher=joblib": "joblib"}
#: Groups of choices that roles have one each of.
_PLACES = {
    "model": ("model@teacher", "model@student"),
    "recipe": ("recipe@teacher.recipe", "recipe@student.recipe"),
}
#: How Python, safetensors and torch say that a disk is full.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|inline_container.*unexpected pos")


def describe(error: BaseException) -> str:
    """One line that says what is wrong and, where it is known, what to do."""
    for cause in _causes(error):
        if isinstance(cause, KdqError):  # also inside Hydra's and OmegaConf's wrappers
            return _flat(cause)
        if missing := re.search(r"Missing mandatory value: ([\w.]+)", str(cause)):
            key = missing[1] if "." in missing[1] else getattr(cause, "full_key", None) or missing[1]
            return f"{key} has no value: give {key}=..."
        if isinstance(cause, ModuleNotFoundError) and cause.name and cause.name.partition(".")[0] != "kdq":
            return no_module(cause)
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, which is slow to import
            return f"{_flat(cause).partition('.')[0]}: raise teacher.recipe.accumulate or student.recipe.accumulate"
        if _FULL.search(str(cause)):
            return (
                f"a disk is full: make room where paths.output_dir is, or in {tempfile.gettempdir()} for temporary "
                "files, and give the command again: it goes on from what is there"
            )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _config_complaint(" ".join(_flat(cause) for cause in _causes(error)))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {_flat(error)} (kdq.debug=true shows where)"


def _config_complaint(message: str) -> str:
    """Hydra's message about an override, with the choices there are."""
    if found := re.search(r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': ([\w ]+?) Config", message):
        group, name, choices = found[1], found[2], found[3].split()
        if extra := _PLUGINS.get(f"{group}={name}"):
            return f"{group}={name} is a plugin: pip install 'kdq[{extra}]'"
        return f"there is no {group}={name}; choose one of {', '.join(choices)}{_nearest(name, choices)}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", message):
        key, _, values = found[1].partition("=")
        return f"{found[1]} has several values: kdq -m runs a grid of them; a list is '{key}=[{values}]'"
    if found := re.search(r"Could not (?:override|append to config) '([^']+)'|Key '(\w+)' is not in struct", message):
        key = (found[1] or found[2]).replace("/", ".").partition("@")[0]
        if places := _PLACES.get(key):
            return f"{key} needs to say whose it is: give {' or '.join(f'{place}=...' for place in places)}"
        inside, options = _options_beside(key)
        listed = ", ".join(options)
        return f"unknown option {key}; valid here: {listed}{_nearest(key, [inside + option for option in options])}"
    return message


def _options_beside(key: str) -> tuple[str, list[str]]:
    """The config's node that holds ``key``, as a prefix, and the names in it; of the whole config as far as known."""
    choices = [word for word in sys.argv[1:] if re.fullmatch(r"\w+(@[\w.]+)?=\w+", word)]
    node: Any = None
    for overrides in (choices, []):  # as the user chose, if it is not a choice that is wrong
        with contextlib.suppress(Exception):
            node = node or compose(overrides)
    if node is None:
        return "", []
    inside = ""
    for name in key.split(".")[:-1]:
        if not OmegaConf.is_dict(node) or not OmegaConf.is_dict(node.get(name)):
            break
        node, inside = node[name], f"{inside}{name}."
    return inside, [str(name) for name in node]


def _nearest(name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())
