"""From an exception to the one line a user reads."""

import contextlib
import difflib
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdq.utils.checks import nearest
from kdq.utils.config import compose
from kdq.utils.errors import KdqError, message, no_module

#: Choices that plugins of Hydra bring, and the extra of kdq that installs each.
_PLUGINS = {"hydra/sweeper=optuna": "optuna", "hydra/launcher=joblib": "joblib"}
#: Groups of choices that roles have one each of.
_PLACES = {
    "model": ("model@teacher", "model@student"),
    "recipe": ("recipe@teacher.recipe", "recipe@student.recipe"),
}
_TRAINING = "teacher.recipe.{0} or student.recipe.{0}"
#: What people write from habit, or wrote for an older kdq, and what to give instead; inner keys of these too.
MOVED = {
    "optimizer": f"kdq trains with SGD: give {_TRAINING.format('lr')}, and momentum and weight_decay beside it",
    "scheduler": f"give {_TRAINING.format('schedule')}",
    "learning_rate": f"give {_TRAINING.format('lr')}",
    "ckpt_path": "a training resumes by itself; it starts from student.weights or teacher.weights",
    "resume": "a training resumes by itself: give the same command again",
    "seed_everything": "give seed",
    "gpus": "give trainer.devices",
    "dataset": "give data",
    "exclude": "give quant.keep_float",
    "quant.exclude": "give quant.keep_float",
    "quant.images": "give quant.calibration_images",
    "quant.search.images": "give quant.search.validation_images",
    "quant.search": "a bit search is chosen with quant=greedy",
    "deploy.images": "give deploy.calibration_images",
    **dict.fromkeys((f"deploy.{name}" for name in ("batch", "runs", "threads", "act_range")), "give deploy=onnx first"),
    "deploy.tolerance": "give deploy=best first",
    "logger.kind": "give logger=wandb, logger=csv or logger=none",
    **{f"logger.{key}": f"give logger.wandb.{key}" for key in ("mode", "project", "entity", "upload")},
}
#: How Python, safetensors and torch say that a disk is full.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|inline_container.*unexpected pos")


def describe(error: BaseException, chosen: Sequence[str] = ()) -> str:
    """One line that says what is wrong and, where it is known, what to do.

    Args:
        chosen: overrides that choose parts of the config beside the user's.
    """
    for cause in _causes(error):
        if isinstance(cause, KdqError):  # also inside Hydra's and OmegaConf's wrappers
            return message(cause)
        if missing := re.search(r"Missing mandatory value: ([\w.]+)", str(cause)):
            key = missing[1] if "." in missing[1] else getattr(cause, "full_key", None) or missing[1]
            return f"{key} has no value: give {key}=..."
        if isinstance(cause, ModuleNotFoundError) and cause.name and cause.name.partition(".")[0] != "kdq":
            return no_module(cause)
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, which is slow to import
            return f"{message(cause).partition('.')[0]}: raise teacher.recipe.accumulate or student.recipe.accumulate"
        if _FULL.search(str(cause)):
            return (
                "a disk is full: make room where paths.output_dir and paths.data_dir are, or, for temporary files, in "
                f"{tempfile.gettempdir()}, and give the command again: it goes on from what is there"
            )
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _config_complaint(" ".join(message(cause) for cause in _causes(error)), chosen)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {message(error)} (kdq.debug=true shows where)"


def _config_complaint(text: str, chosen: Sequence[str]) -> str:
    """Hydra's message about an override, with the choices there are."""
    if found := re.search(r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': ([\w ]+?) Config", text):
        group, name, choices = found[1], found[2], found[3].split()
        if extra := _PLUGINS.get(f"{group}={name}"):
            return f"{group}={name} is a plugin: pip install 'kdq[{extra}]'"
        return f"there is no {group}={name}; choose one of {', '.join(choices)}{nearest(name, choices)}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, values = found[1].partition("=")
        return f"{found[1]} has several values: kdq -m runs a grid of them; a list is '{key}=[{values}]'"
    if found := re.search(r"Could not (?:override|append to config) '([^']+)'|Key '(\w+)' is not in struct", text):
        key = (found[1] or found[2]).replace("/", ".").partition("@")[0]
        if places := _PLACES.get(key):
            return f"{key} needs to say whose it is: give {' or '.join(f'{place}=...' for place in places)}"
        return unknown_option(key, _composed(chosen))
    return text


def unknown_option(key: str, config: Mapping[str, Any], known: Collection[str] | None = None) -> str:
    """One line for ``key``, which nothing reads: where it is now, where else its name is, or the nearest beside it.

    >>> unknown_option("lr", {"student": {"recipe": {"lr": 0.1}}})
    'there is no option lr: give student.recipe.lr'

    Args:
        config: as it is, to look for the name in.
        known: what is read beside ``key``; None: what is there.
    """
    words = key.split(".")
    there = [path for path in _paths(config) if not f"{path}.".startswith(f"{key}.")]
    for count in range(len(words), 0, -1):
        prefix = ".".join(words[:count])
        if prefix in MOVED and prefix not in there:
            return f"there is no option {key}: {MOVED[prefix]}"
    inside, node = "", config
    for word in words[:-1]:
        if not isinstance(node, Mapping) or not isinstance(node.get(word), Mapping):
            break
        node, inside = node[word], f"{inside}{word}."
    elsewhere = [path for path in there if path.endswith(f".{words[-1]}")]
    nearby = [path for path in elsewhere if path.startswith(f"{words[0]}.")] or elsewhere
    if 0 < len(nearby) <= 3 and words[-1] not in ("name", "seed", "_target_"):
        return f"there is no option {key}: give {' or '.join(nearby)}"
    depth = inside.count(".")
    beside = [str(name) for name in (node if known is None or depth < len(words) - 1 else known)]
    near = difflib.get_close_matches(words[depth], beside, 1)
    guess = f" (did you mean {inside}{near[0]}?)" if near else ""
    return f"unknown option {key}; valid here: {', '.join(beside) or 'nothing'}{guess}"


def _paths(node: Any, inside: str = "") -> Iterator[str]:
    for name, value in node.items() if isinstance(node, Mapping) else ():
        yield f"{inside}{name}"
        yield from _paths(value, f"{inside}{name}.")


def _composed(chosen: Sequence[str]) -> dict[str, Any]:
    """The config as the user's command chooses it, without what is wrong in it as far as that is known."""
    choices = [word for word in sys.argv[1:] if re.fullmatch(r"\w+(@[\w.]+)?=\w+", word)]
    for overrides in ([*chosen, *choices], [*chosen]):
        with contextlib.suppress(Exception):
            return OmegaConf.to_container(compose(overrides), resolve=False)  # type: ignore[return-value]
    return {}


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
