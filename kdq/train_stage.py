"""The stages that train: teacher -> student, each taken from the store when it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hydra.utils
import torch
from torch import Tensor, nn

from kdq.cell import Cell, plain
from kdq.distill.baseline import Baseline
from kdq.distill.recipe import Recipe
from kdq.errors import KdqError
from kdq.evaluate import evaluate
from kdq.fit import fit
from kdq.models import build
from kdq.store import Entry
from kdq.weights import file_digest, load_weights, locate

#: How a teacher is trained.
CROSS_ENTROPY = {"_target_": "kdq.distill.baseline.Baseline"}


def float_model(cell: Cell) -> Entry:
    """The model whose weights the cell quantizes: the teacher itself, or the student that the method trains."""
    if cell.role == "teacher":
        return teacher(cell)
    method = plain(cell.cfg.method)
    name = method.pop("name")
    taught = getattr(hydra.utils.get_class(method["_target_"]), "needs_teacher", False)
    return _trained(cell, "student", name, method, teacher(cell) if taught else None)


def teacher(cell: Cell) -> Entry:
    """The teacher: read from ``teacher.weights``, or trained with cross-entropy when there are none."""
    role = cell.cfg.teacher
    if role.weights is None:
        return _trained(cell, "teacher", "baseline", CROSS_ENTROPY, None)
    path = locate(role.weights)
    spec = {"stage": "load", "net": plain(role.net), "weights": file_digest(path), "data": cell.images.spec()}

    def read(work: object) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        network = build(plain(role.net))
        load_weights(network, path)
        _check_fit(cell, network, role.name)
        metrics = evaluate(network, cell.images.evaluation("val", torch.device("cpu")), cell.cfg.data.num_classes)
        return network.state_dict(), {"val_top1": metrics["top1"], "train_seconds": 0.0}

    return cell.store.get_or_make(spec, f"{cell.cfg.data.name}-loaded-{role.name}", read)


def _trained(cell: Cell, which: str, method_name: str, method: Mapping[str, Any], taught_by: Entry | None) -> Entry:
    """The network of role ``which``, trained with ``method``. Equal specs are one entry, whatever role asks."""
    cfg, role = cell.cfg, cell.cfg[which]
    # A teacher with weights is not trained at all, so only a student starts from some.
    initial = locate(role.weights) if role.weights is not None else None
    spec = {
        "stage": "train",
        "data": cell.images.spec(),
        "net": plain(role.net),
        "weights": None if initial is None else file_digest(initial),
        "method": dict(method),
        "recipe": plain(role.recipe),
        "precision": cfg.trainer.precision,
        "seed": role.seed,
        "teacher": None if taught_by is None else taught_by.key,
    }

    def train(work: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        torch.manual_seed(role.seed)
        network = build(plain(role.net))
        if initial is not None:
            load_weights(network, initial)
        _check_fit(cell, network, role.name)
        extra = {} if taught_by is None else {"teacher": cell.network("teacher", taught_by)}
        recipe = Recipe(**plain(role.recipe))
        module = hydra.utils.instantiate(dict(method), network, recipe, cfg.data.num_classes, **extra)
        if not isinstance(module, Baseline):
            raise KdqError(f"{method['_target_']} is not a kdq.distill.baseline.Baseline: derive your method from it")
        label = "teacher" if which == "teacher" else method_name
        job_type = "teacher" if which == "teacher" else "distill"
        with cell.tracked(job_type, f"{label}-{role.name}-s{role.seed}", {"method": label}) as logger:
            title = f"training {label} {role.name}"
            return fit(module, cell.images, plain(cfg.trainer), role.seed, work, logger or False, title)

    return cell.store.get_or_make(spec, f"{cfg.data.name}-{method_name}-{role.name}-s{role.seed}", train)


def _check_fit(cell: Cell, network: nn.Module, name: str) -> None:
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
