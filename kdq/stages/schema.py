"""The names and types of what kdq reads of the config itself; conf/ has the values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdq.train.recipe import Recipe
from kdq.utils.checks import is_peer


@dataclass
class Augment:
    pad: int
    flip: bool
    cutout: int


@dataclass
class Data:
    name: str | int
    source: Any
    num_classes: int
    in_channels: int
    mean: list[float] | None
    std: list[float] | None
    val_fraction: float
    split_seed: int
    train_limit: int | None
    test_limit: int | None
    augment: Augment


@dataclass
class Role:
    name: str | int
    net: Any
    recipe: Recipe
    weights: str | None
    seed: int


@dataclass
class Peer:
    name: str | int
    net: Any
    weights: str | None
    seed: int | None


@dataclass
class Paths:
    output_dir: str
    data_dir: str


@dataclass
class Kdq:
    debug: bool
    train: str | None
    objective: str | list[str] | None


@dataclass
class NoDeploy:
    formats: list[str]


@dataclass
class Deploy(NoDeploy):
    calibration_images: int
    act_range: str
    batch: int
    runs: int
    threads: int | None


@dataclass
class BestDeploy(Deploy):
    tolerance: float
    runtimes: list[str]


@dataclass
class Config:
    seed: int
    data: Data
    teacher: Role
    student: Role
    method: Any
    quant: Any
    tune: Any
    deploy: Any
    trainer: Any
    callbacks: Any
    logger: Any
    paths: Paths
    sweep: str | int
    kdq: Kdq


def peers_of(method: Mapping[str, Any]) -> dict[str, Any]:
    """The networks of ``method`` that learn beside its student, by name: see :func:`is_peer`.

    >>> peers_of({"name": "dml", "peer2": {"net": {}}})
    {'peer2': {'weights': None, 'seed': None, 'net': {}}}
    """
    start = {"weights": None, "seed": None}
    nodes = {name: node for name, node in sorted(method.items()) if is_peer(name)}
    return {name: {**start, **node} if isinstance(node, Mapping) else node for name, node in nodes.items()}
