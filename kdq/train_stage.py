"""The stages that train: teacher -> student, each taken from the store when it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from torch import Tensor

from kdq.cell import Cell, plain
from kdq.evaluate import evaluate
from kdq.models import build
from kdq.pretrained import IMAGENET
from kdq.processes import run_training
from kdq.store import Entry
from kdq.training import NetworkSpec, TrainingSpec, check_fit
from kdq.weights import file_digest, load_weights, locate

#: How a teacher is trained, and the network that a student may start from.
CROSS_ENTROPY = {"_target_": "kdq.distill.baseline.Baseline"}
#: The value of ``weights`` that asks for the stored cross-entropy network of the same data, net, recipe and seed.
BASELINE = "baseline"


def float_model(cell: Cell) -> Entry:
    """The model whose weights the cell quantizes: the teacher itself, or the student that the method trains."""
    if cell.role == "teacher":
        return teacher(cell)
    method = plain(cell.cfg.method)
    name, peer = method.pop("name"), method.pop("peer", None)
    role = plain(cell.cfg.student)
    role["weights"] = method.pop("weights", role["weights"])
    takes = getattr(hydra.utils.get_class(method["_target_"]), "takes", ())
    others: dict[str, tuple[NetworkSpec, str | None]] = {}
    if "teacher" in takes:
        entry = teacher(cell)
        spec = NetworkSpec(cell.cfg.teacher.name, plain(cell.cfg.teacher.net), 0, _file(entry))
        others["teacher"] = (spec, entry.key)
    if "peer" in takes:
        seed = role["seed"] + 1 if peer["seed"] is None else peer["seed"]
        others["peer"] = _start(cell, {**peer, "seed": seed, "recipe": role["recipe"]})
    return _trained(cell, "distill", name, role, method, others)


def teacher(cell: Cell) -> Entry:
    """The teacher: read from ``teacher.weights``, or trained with cross-entropy when there are none."""
    role = plain(cell.cfg.teacher)
    if role["weights"] is None:
        return _trained(cell, "teacher", "baseline", role, CROSS_ENTROPY, {})
    path = locate(role["weights"])
    spec = {"stage": "load", "net": role["net"], "weights": file_digest(path), "data": cell.images.spec()}

    def read(work: object) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        network = build(role["net"])
        load_weights(network, path)
        check_fit(cell, network, role["name"])
        metrics = evaluate(network, cell.images.evaluation("val", torch.device("cpu")), cell.cfg.data.num_classes)
        return network.state_dict(), {"val_top1": metrics["top1"], "train_seconds": 0.0}

    return cell.store.get_or_make(spec, f"{cell.cfg.data.name}-loaded-{role['name']}", read)


def _trained(
    cell: Cell,
    job_type: str,
    method_name: str,
    role: Mapping[str, Any],
    method: Mapping[str, Any],
    others: Mapping[str, tuple[NetworkSpec, str | None]],
) -> Entry:
    """The network of ``role``, trained with ``method``. Equal specs are one entry, whoever asks.

    Args:
        role: ``name, net, weights, recipe, seed``.
        others: the networks that the method takes beside it, each with what identifies its weights.
    """
    student, start = _start(cell, role)
    spec = {
        "stage": "train",
        "data": cell.images.spec(),
        "net": role["net"],
        "weights": start,
        "method": dict(method),
        "recipe": role["recipe"],
        "precision": cell.cfg.trainer.precision,
        "seed": role["seed"],
        "others": {name: {"net": net.net, "seed": net.seed, "weights": key} for name, (net, key) in others.items()},
    }
    slug = f"{cell.cfg.data.name}-{method_name}-{role['name']}-s{role['seed']}"
    label = "teacher" if job_type == "teacher" else method_name
    networks = {"student": student} | {name: net for name, (net, _) in others.items()}
    training = TrainingSpec(label, job_type, method, role["recipe"], networks)

    def train(work: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        best, metrics = run_training(cell, training, work)
        results = {
            name: {"val_top1": 100 * one.top1, "best_epoch": one.epoch, "learner": name} | metrics
            for name, one in best.items()
        }
        for name in set(best) - {"student"}:  # whose architecture is not the one that the config names
            results[name] |= {"arch": networks[name].name, "net": networks[name].net}

        def keep(name: str) -> str:
            return cell.store.get_or_make(
                spec | {"learner": name}, f"{slug}-{name}", lambda _: (best[name].weights, results[name])
            ).key

        # The first of equals: the student, where it is as good as its peer.
        winner, *losers = sorted(best, key=lambda name: -best[name].top1)
        for name in losers:
            results[winner] |= {f"val_top1_{name}": 100 * best[name].top1, f"key_{name}": keep(name)}
        return best[winner].weights, results[winner]

    return cell.store.get_or_make(spec, slug, train)


def _start(cell: Cell, role: Mapping[str, Any]) -> tuple[NetworkSpec, str | None]:
    """A network and where its training starts, with what identifies those weights: None for random ones, which the
    seed identifies."""
    source = role["weights"]
    if source is None or source == IMAGENET:
        weights, identity = source, source
    elif source == BASELINE:
        entry = _trained(cell, "distill", "baseline", {**role, "weights": None}, CROSS_ENTROPY, {})
        weights, identity = _file(entry), entry.key
    else:
        path = locate(source)
        weights, identity = str(path), file_digest(path)
    return NetworkSpec(role["name"], role["net"], role["seed"], weights), identity


def _file(entry: Entry) -> str:
    return str((entry.path / "weights.safetensors").absolute())
