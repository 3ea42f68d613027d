"""The config's keys and who reads each: a key that nobody reads is refused, before anything is made of the config.

:mod:`kdq.stages.schema` says the names and the types of what kdq reads itself. What is passed whole to a callable (a
node with a ``_target_``) is what that callable takes. A key of the user's own is read where another value refers to it,
as ``${data.root}`` does.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, get_type_hints

from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from kdq.distill.terms import Terms, method_of
from kdq.quant.bitsearch.config import SEARCH_OPTIONS
from kdq.quant.config import OPTIONS
from kdq.stages.schema import BestDeploy, Config, Deploy, NoDeploy, Peer, peers_of
from kdq.train.recipe import Recipe
from kdq.utils.calls import imported, parameters
from kdq.utils.checks import LARGEST, check_type
from kdq.utils.errors import KdqError
from kdq.utils.messages import unknown_option

#: Seeds are multiplied and added before they reach torch and NumPy: the largest one is LARGEST.
SEEDS = ("seed", "split_seed")
#: What chooses a node that is not a value.
CHOICES = {"teacher": "a network", "student": "a network", "teacher.recipe": "a recipe", "student.recipe": "a recipe"}
#: Whose options ``tune=none`` has, for a grid that has others beside it.
UNTUNED = "kdq.distill.QAD"
#: What ``deploy`` may be; of two that are as near to a config the first is meant.
DEPLOY = (NoDeploy, BestDeploy, Deploy)
#: Callbacks that Lightning refuses where nothing logs.
LOGGING = (DeviceStatsMonitor, LearningRateMonitor)
#: Entries of ``quant`` beside the fields of a QuantConfig.
QUANT = ("name", "bits", "calibration_images", "seed", "search")


def check_config(cfg: DictConfig) -> None:
    """Refuse a config with a key that nobody reads, or with a value of another type than its reader takes."""
    names = [str(name) for name in cfg if name != "hydra"]
    check = _Check({name: _values(cfg[name]) for name in names}, referred(cfg))
    check.node("", check.config, Config)
    deploy, quant = check.config["deploy"], check.config["quant"]
    check.node("deploy", deploy, min(DEPLOY, key=lambda kind: len(set(get_type_hints(kind)) ^ set(deploy))))
    check.module("method", check.config["method"])
    check.module("tune", check.config["tune"])
    check.present("quant", quant, QUANT[:-1])
    check.names("quant", quant, (*QUANT, *OPTIONS))
    check.names("quant.search", quant.get("search") or {}, SEARCH_OPTIONS)
    check.seed("quant.seed", quant["seed"])
    for name, callback in check.config["callbacks"].items():
        if not isinstance(callback, Mapping) or "_target_" not in callback:
            raise KdqError(f"callbacks.{name}={callback} is no callback: give callbacks.{name}._target_=package.Class")
        kind = imported(f"callbacks.{name}", callback["_target_"])
        if isinstance(kind, type) and issubclass(kind, LOGGING) and not check.config["logger"]:
            raise KdqError(f"callbacks.{name} logs, and logger=none takes nothing: give a logger such as logger=csv")
    for name in ("data", "teacher", "student", "quant", "callbacks"):
        check.calls(name, check.config[name])


def _values(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def referred(cfg: DictConfig) -> set[str]:
    """Everything in ``cfg`` that an interpolation may mean, as it is written: ``data.root``, ``.root``."""
    without = {name: value for name, value in cfg.items_ex(resolve=False) if name != "hydra"}
    text = OmegaConf.to_yaml(OmegaConf.create(without), resolve=False)
    return {word for inside in re.findall(r"\$\{[^\n]*", text) for word in re.findall(r"\.?[\w][\w.]*", inside)}


@dataclass
class _Check:
    """The checks of one config: its values, and what its interpolations refer to."""

    config: dict[str, Any]
    referred: set[str]

    def node(self, where: str, node: Any, schema: type) -> None:
        """``node`` has the fields of the dataclass ``schema``, and nothing else."""
        hints = get_type_hints(schema)
        if not isinstance(node, Mapping) and (kind := CHOICES.get(where)):
            group = f"recipe@{where}" if "." in where else f"model@{where}"
            raise KdqError(f"{where}={node} is no choice: {kind} is chosen with {group}={node}")
        self.names(where, node, hints)
        self.present(where, node, hints)
        for name, hint in hints.items():
            option = f"{where}.{name}".lstrip(".")
            if isinstance(node[name], Mapping) and "_target_" in node[name]:
                continue  # takes what its callable does
            if isinstance(hint, type) and is_dataclass(hint):
                self.node(option, node[name], hint)
            elif name in SEEDS and not (node[name] is None and hint is not int):
                self.seed(option, node[name])
            elif node[name] != "???":  # a role's that this method does not use
                check_type(option, node[name], hint)

    def names(self, where: str, node: Any, known: Collection[str]) -> None:
        """``node`` has keys, and they are ``known``, or referred to by another value."""
        if not isinstance(node, Mapping):
            raise KdqError(f"{where}={node} has options of its own: {', '.join(f'{where}.{name}' for name in known)}")
        for name in node:
            option = f"{where}.{name}".lstrip(".")
            if name not in known and not {option, f".{name}"} & self.referred:
                untuned = not where.startswith("tune") and self.config["tune"].get("_target_") is None
                asked = {name: value for name, value in self.config.items() if not (untuned and name == "tune")}
                raise KdqError(unknown_option(option, asked, known))

    def present(self, where: str, node: Mapping[str, Any], needed: Iterable[str]) -> None:
        """``node`` has a value of each name."""
        for name in needed:
            if name not in node:
                option = f"{where}.{name}".lstrip(".")
                raise KdqError(f"{option} is missing in this config: give +{option}=...")

    def seed(self, option: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
            raise KdqError(f"{option}={value!r} must be a whole number from 0 to {LARGEST}")

    def module(self, where: str, node: Mapping[str, Any]) -> None:
        """``method`` and ``tune`` have the options of their module, ``name``, and what their stage takes itself."""
        self.present(where, node, ("name", "_target_"))
        target = node["_target_"] or (UNTUNED if where == "tune" and "recipe" in node else None)  # older rows have none
        if target is None:
            return self.names(where, node, ("name", "_target_"))
        kind = imported(where, target)
        takes = getattr(kind, "takes", ())
        options = {name: value for name, value in node.items() if name != "name"} | {"_target_": target}
        if where == "method":
            options.pop("weights", None)
            if "peer" in takes:
                for name, peer in peers_of(node).items():
                    self.node(f"method.{name}", peer, Peer)
                    self.calls(f"method.{name}", options.pop(name))
            if kind is Terms:
                self.terms(f"{where}.terms", options.pop("terms", {}))
        else:
            own = ("images", "recipe", *(("teacher",) if "teacher" in takes else ()))
            self.present(where, options, own)
            options = {name: value for name, value in options.items() if name not in own}
            check_type("tune.images", node["images"], int | None)
            self.node("tune.recipe", node["recipe"], Recipe)
        if (known := parameters(kind)) is not None:  # but for what the stage gives
            given = ("student", "num_classes", "config", "seed", *takes)
            self.names(where, options, ["_target_", *(name for name in known if name not in given)])
        return self.calls(where, options)

    def terms(self, where: str, node: Any) -> None:
        """``method.terms`` has methods by name, each with its options, ``name``, and ``weight``."""
        if not isinstance(node, Mapping):
            raise KdqError(f"{where}={node} must be methods by name: +method@{where}.at=at")
        for name, options in node.items():
            if not isinstance(options, Mapping):
                raise KdqError(f"{where}.{name}={options} has options of its own: +{where}.{name}.weight=...")
            if "_target_" in options:
                imported(f"{where}.{name}", options["_target_"])
            kind, options = method_of(name, options)
            known = parameters(kind)
            self.names(f"{where}.{name}", options, options if known is None else ("name", "weight", *known))

    def calls(self, where: str, node: Any) -> None:
        """Whatever has a ``_target_`` takes the options beside it."""
        if isinstance(node, list):
            node = dict(enumerate(node))
        if not isinstance(node, Mapping):
            return
        if node.get("_target_", "???") != "???":
            known = parameters(imported(where, node["_target_"]))
            options = {name: value for name, value in node.items() if not str(name).startswith("_")}
            if where.endswith(".net"):
                options.pop("num_classes", None)  # passed only to what takes it
            self.names(where, options, options if known is None else known)
        for name, value in node.items():
            self.calls(f"{where}.{name}", value)
