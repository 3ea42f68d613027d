"""One training as plain values, which any process can run: the networks, how they learn, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from torch import nn

from kdq.cell import Cell, plain
from kdq.distill.baseline import Baseline
from kdq.distill.recipe import Recipe
from kdq.errors import KdqError
from kdq.fit import Best, fit
from kdq.models import build
from kdq.pretrained import IMAGENET, load_imagenet
from kdq.weights import load_weights

#: What ``trainer.devices`` may say beside a number or a list.
ALL_DEVICES = (-1, "-1", "auto")


@dataclass(frozen=True)
class NetworkSpec:
    """A network as it enters a training.

    Attributes:
        name: for people.
        net: its recipe, for :func:`kdq.models.build`.
        seed: of its random weights.
        weights: the file that it starts from, ``imagenet``, or None: random.
    """

    name: str
    net: Mapping[str, Any]
    seed: int
    weights: str | None

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        network = build(self.net)
        if self.weights == IMAGENET:
            load_imagenet(network, self.net)
        elif self.weights is not None:
            load_weights(network, Path(self.weights))
        return network


@dataclass(frozen=True)
class TrainingSpec:
    """A training, apart from the data and the machine; all of it are JSON values.

    Attributes:
        label: the method's name for people and logs.
        job_type: ``teacher`` or ``distill``: what the logger files it under.
        method: ``_target_``, a :class:`~kdq.distill.baseline.Baseline`, and its options.
        recipe: the fields of :class:`~kdq.distill.recipe.Recipe`.
        networks: ``student`` and what else the method takes.
    """

    label: str
    job_type: str
    method: Mapping[str, Any]
    recipe: Mapping[str, Any]
    networks: Mapping[str, NetworkSpec]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingSpec:
        networks = {name: NetworkSpec(**network) for name, network in values["networks"].items()}
        return cls(**{**values, "networks": networks})


def train(
    cell: Cell, spec: TrainingSpec, work: Path, rank: int = 0, world_size: int = 1
) -> tuple[dict[str, Best], dict[str, Any]]:
    """Run ``spec`` in this process, one of ``world_size``; see :func:`kdq.fit.fit` for what it returns.

    Only rank 0 logs.
    """
    networks = {name: network.build() for name, network in spec.networks.items()}
    for name, network in networks.items():
        check_fit(cell, network, spec.networks[name].name)
    student, others = spec.networks["student"], {n: net for n, net in networks.items() if n != "student"}
    recipe, classes = Recipe(**spec.recipe), cell.cfg.data.num_classes
    target, options = spec.method["_target_"], {key: v for key, v in spec.method.items() if key != "_target_"}
    kind = hydra.utils.get_class(target)
    if not issubclass(kind, Baseline):
        raise KdqError(f"{target} is not a kdq.distill.baseline.Baseline: derive your method from it")
    try:
        module = kind(networks["student"], recipe, classes, student.seed, **others, **options)
    except TypeError as error:
        raise KdqError(f"{target} does not take these options ({error}): {', '.join(options)}") from error
    trainer, title = plain(cell.cfg.trainer), f"training {spec.label} {student.name}"
    if trainer["devices"] in ALL_DEVICES:
        trainer["devices"] = world_size
    if world_size == 1:
        trainer["strategy"] = "auto"
    if rank > 0:
        return fit(module, cell.images, trainer, work)
    with cell.tracked(spec.job_type, f"{spec.label}-{student.name}-s{student.seed}", {"method": spec.label}) as logger:
        return fit(module, cell.images, trainer, work, logger or False, title)


def check_fit(cell: Cell, network: nn.Module, name: str) -> None:
    """Run one image through ``network``.

    Raises:
        KdqError: it cannot take the images, or gives another number of logits than there are classes.
    """
    data = cell.cfg.data
    image = torch.zeros(1, data.in_channels, cell.images.height, cell.images.width)
    try:
        with torch.no_grad():
            logits = network.eval()(image)
    except RuntimeError as error:
        shape, cause = tuple(image.shape[1:]), str(error).splitlines()[0]
        raise KdqError(f"{name} cannot take images of shape {shape}: {cause}") from error
    network.train()
    if logits.shape != (1, data.num_classes):
        raise KdqError(
            f"{name} gives {logits.shape[-1]} logits but data={data.name} has {data.num_classes} classes: "
            "give its net as many num_classes"
        )
