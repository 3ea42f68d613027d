"""The stage that tunes: a row's quantized network, trained on with its alphabets kept (:mod:`kdq.distill.qad`).

    float model -> quantized to the row's width -> fake-quantized, trained -> a model of the store -> the row

Every width of a cell is a training of its own, which begins at a packed file: that is what all its processes read, and
what a killed one goes on from. What is kept is the last epoch, or the start if the method's own loss on validation
images was lower there. (Not their accuracy: of weights from outside, which may have been trained on these images, it
says little, and of two networks that are both near a third one, how near each is says more.)
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from torch import Tensor

from kdq.models.build import build
from kdq.quant.fake import fake_quantized, layout, quantized, with_layout
from kdq.quant.layers import LeftFloat
from kdq.quant.network import Quantized
from kdq.quant.packing.file import save_packed
from kdq.quant.packing.weights import with_float_dtype
from kdq.quant.report import LayerReport, Report
from kdq.records.store import Entry, Make, key_of
from kdq.records.user_code import user_code
from kdq.stages.asked import asked_bits, quant_spec
from kdq.stages.cell import Cell
from kdq.stages.quantize import Tuned, quantized_once
from kdq.stages.train import Model, artifact, obtain, teacher_model
from kdq.stages.training import NetworkSpec, TrainingSpec, check_module
from kdq.stages.worker import run_training
from kdq.train.recipe import Recipe
from kdq.train.trainer import with_trainer_flags
from kdq.utils.checks import one_of
from kdq.utils.config import plain
from kdq.utils.errors import KdqError
from kdq.utils.files import parse_json, write_text

log = logging.getLogger(__name__)

#: Who teaches: the float network that was quantized, or the cell's teacher.
TEACHERS = ("self", "cell")


def tuned_models(cell: Cell, model: Model) -> dict[str, Model]:
    """The tuned model of each row that the cell asks for, by :func:`asked_bits`; none with ``tune=none``."""
    tune = cell.cfg.tune
    if tune._target_ is None:
        return {}
    if cell.cfg.quant.solver is None:
        raise KdqError(f"tune={tune.name} trains a quantized network, and quant={cell.cfg.quant.name} makes none")
    return {name: _tuned_model(cell, model, name, bits) for name, bits in asked_bits(cell).items()}


def _tuned_model(cell: Cell, model: Model, name: str, bits: int | None) -> Model:
    method, role = plain(cell.cfg.tune), cell.of_role(cell.role)
    label, images = method.pop("name"), method.pop("images")
    recipe = with_trainer_flags(method.pop("recipe"), plain(cell.cfg.trainer))
    Recipe(**recipe)
    if not method.get("cutmix"):  # younger than the others: older keys stay
        method.pop("cutmix", None)
    if images is not None and images < 1:
        raise KdqError(f"tune.images={images} must be at least 1, or null for all training images")
    networks = {"student": NetworkSpec(role["name"], role["net"], role["seed"], None)}
    models = {"student": model}
    if "teacher" in getattr(hydra.utils.get_class(method["_target_"]), "takes", ()):
        own = one_of("tune.teacher", method.pop("teacher"), TEACHERS) == "self" or cell.role == "teacher"
        models["teacher"] = model if own else teacher_model(cell)
        teacher = role if own else cell.of_role("teacher")
        networks["teacher"] = NetworkSpec(teacher["name"], teacher["net"], teacher["seed"], None)
    quant = {key: value for key, value in quant_spec(cell.cfg.quant).items() if key not in ("name", "bits")}
    spec = {
        "stage": "tune",
        # Tunings of before differed under the same options.
        "optimizer": "adam, rates in levels, last epoch kept if its loss is lower",
        "models": {name: model.key for name, model in models.items()},
        "data": cell.images.spec(),
        "quant": quant,
        "bits": bits,
        "method": method,
        "images": images,
        "recipe": recipe,
        "precision": cell.cfg.trainer.precision,
        **cell.training_flags(),
        "seed": role["seed"],
        **user_code(quant, method, plain(cell.cfg.callbacks), plain(cell.cfg.data.augment)),
    }
    slug = f"{cell.cfg.data.name}-{cell.cfg.method.name}-{role['name']}-s{role['seed']}-{cell.cfg.quant.name}-b{name}"
    training = TrainingSpec(
        label, "tune", method, recipe, networks, f"{slug}-{label}", f"{cell.name}-b{name}", key_of(spec), images=images,
        images_seed=cell.cfg.quant.seed,
    )  # fmt: skip
    check_module(cell, training)
    needs = tuple({model.key: model for model in models.values()}.values())
    return Model(spec, training.slug, training.name, "tuned", needs, _make(cell, training, models, name), training)


def _make(cell: Cell, plan: TrainingSpec, models: Mapping[str, Model], name: str) -> Make:
    @contextmanager
    def make(work: Path) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Any]]]:
        entry = obtain(cell.store, models["student"])
        images, there = plan.images or 0, len(cell.images.split.train)
        if images > there:
            log.warning("tune.images=%d, but there are %d training images: all are used", images, there)
        start, facts = _start(cell, entry, name, work)
        networks = dict(plan.networks)
        for role, model in models.items():  # of students that learned together, the best one has its own net
            stored = obtain(cell.store, model)
            net = cell.net_of(cell.role if model is models["student"] else "teacher", stored)
            file = start if role == "student" else (stored.path / "weights.safetensors").absolute()
            networks[role] = replace(networks[role], net=net, weights=str(file))
        inputs = list(dict.fromkeys(artifact(cell.store, model) for model in models.values()))  # may teach itself
        training = replace(plan, networks=networks, inputs=inputs)
        with run_training(cell, training, work) as (best, metrics):
            student = best["student"]
            if student.epoch < 0:
                log.warning("%s had a loss of %.4f on validation images before it was tuned and has %.4f now: what it "
                            "was is kept", plan.name, metrics["loss_start"], metrics["loss"])  # fmt: skip
            scores = {"val_top1": 100 * student.top1, "best_epoch": student.epoch}
            yield student.weights, scores | facts | metrics

    return make


def _start(cell: Cell, entry: Entry, name: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """The quantized network as a packed file in ``work``, and what its row will say of it; made unless it is there."""
    file, facts = (work / "start.kdq").absolute(), work / "start.json"
    if not facts.is_file():  # it is written last
        made, top1 = quantized_once(cell, entry, name)
        save_packed(made.network, file)
        said = {"val_top1_start": top1, "layout": layout(fake_quantized(made.network)), "report": asdict(made.report)}
        write_text(facts, json.dumps(said))
    return file, parse_json(facts.read_text())


def tuned(cell: Cell, entry: Entry, made: Entry) -> Tuned:
    """The network of a row, from the float model's ``entry`` and the tuned one that was ``made`` of it."""
    report = Report(**made.metrics["report"])
    report.layers = [LayerReport(**values) for values in made.metrics["report"]["layers"]]
    report.left = [LeftFloat(**values) for values in made.metrics["report"].get("left", ())]
    network = with_layout(build(cell.net_of(cell.role, entry)), made.metrics["layout"])
    network.load_state_dict(made.weights())
    network = quantized(network).to(cell.device).to(memory_format=torch.channels_last)
    if cell.cfg.quant.float_dtype is not None:
        network = with_float_dtype(network, cell.cfg.quant.float_dtype)
    facts = made.metrics
    return Tuned(Quantized(network, report), facts["train_seconds"], facts["epochs"])
