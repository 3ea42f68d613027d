"""One training as plain values, which any process can run: the networks, how they learn, and with what."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import hydra.utils
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torchmetrics import MeanMetric

from kdq.distill.layers import COMPILED
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress
from kdq.models.build import build
from kdq.models.libraries import IMAGENET
from kdq.models.pretrained import load_imagenet
from kdq.models.weights import load_weights
from kdq.quant.fake import fake_quantized, with_layout
from kdq.quant.layers import layer_name
from kdq.quant.packing.file import load_packed
from kdq.records.store import Store, key_of, weights_file
from kdq.stages.cell import Cell
from kdq.tracking.lightning_log import Nowhere
from kdq.tracking.run import Artifact, RunLogger
from kdq.train.fit import Best, fit, ranked
from kdq.train.halving import SuccessiveHalving
from kdq.train.recipe import Recipe
from kdq.train.trainer import ALL_DEVICES
from kdq.utils.calls import called, imported, made
from kdq.utils.config import plain
from kdq.utils.errors import KdqError


@dataclass(frozen=True)
class NetworkSpec:
    """A network as it enters a training. From a packed file (``.kdq``) it rounds its weights to the file's alphabets
    whenever it runs."""

    name: str  # for people
    net: Mapping[str, Any]  # its recipe, for kdq.models.build.build
    seed: int  # of its random weights
    weights: str | None  # the file that it starts from, or imagenet; None: random

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        network = build(self.net)
        if self.weights == IMAGENET:
            load_imagenet(network, self.net)
        elif self.weights is not None and self.weights.endswith(".kdq"):
            return fake_quantized(load_packed(self.weights, network))
        elif self.weights is not None:
            load_weights(network, Path(self.weights), new_head=True)
        return network


@dataclass(frozen=True)
class TrainingSpec:
    """A training, apart from the data and the machine; all of it are JSON values. ``slug``, ``name`` and ``key`` are of
    the model that it makes, see :class:`kdq.stages.train.Model`."""

    label: str  # the method's name for people and logs
    job_type: str  # teacher, distill or tune: what the logger files it under
    method: Mapping[str, Any]  # _target_, a kdq.distill.module.DistillationModule, and its options
    recipe: Mapping[str, Any]  # the fields of kdq.train.recipe.Recipe
    networks: Mapping[str, NetworkSpec]  # student and what else the method takes
    slug: str
    name: str
    key: str
    inputs: Sequence[str] = ()  # references to the stored models that it takes, for its log
    images: int | None = None  # so many calibration images, drawn by images_seed; None: all training images
    images_seed: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        networks = {name: NetworkSpec(**network) for name, network in values["networks"].items()}
        return cls(**{**values, "networks": networks})


@contextmanager
def train(
    cell: Cell, spec: TrainingSpec, work: Path, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[dict[str, Best], dict[str, Any]]]:
    """Run ``spec`` in this process, one of ``world_size``; see :func:`kdq.train.fit.fit` for what the block gets.

    Only rank 0 logs. Its log is closed, which may wait for a server, when the block is left.
    """
    networks = {name: network.build() for name, network in spec.networks.items()}
    for name, network in networks.items():
        check_fit(cell, network, spec.networks[name].name)
        see = getattr(network, "see", None)
        if spec.networks[name].weights is None and callable(see):
            images = cell.images  # 5000 of those that it trains on, for a network that begins with a look at them
            see(images.preprocess(images.set.train_images[images.split.train[:5000]]))
    recipe, module = Recipe(**spec.recipe), made_module(spec, networks, cell.cfg.data.num_classes)
    images = cell.images if spec.images is None else cell.images.calibrating(spec.images, spec.images_seed)
    trainer, title = plain(cell.cfg.trainer), f"training {spec.label} {spec.networks['student'].name}"
    if trainer["devices"] in ALL_DEVICES:
        trainer["devices"] = world_size // trainer["num_nodes"]
    if world_size == 1:
        trainer["strategy"] = "auto"
    callbacks = _callbacks(cell, spec)
    if rank > 0:
        yield fit(module, images, trainer, recipe, work, [Nowhere()], callbacks)  # some refuse to do without
        return
    with _tracked(cell, spec) as track:
        best, metrics = fit(module, images, trainer, recipe, work, track.loggers, callbacks, title)
        if spec.job_type == "tune":
            best["student"], losses = _start_or_end(cell, spec, best["student"])
            metrics |= losses
        winner = best[ranked(best)[0]]
        facts = {"val_top1": 100 * winner.top1, "best_epoch": winner.epoch} | metrics
        track.summary(facts)
        log_model(track, cell.store, spec.slug, spec.key, winner.weights, facts)
        yield best, metrics


def _start_or_end(cell: Cell, spec: TrainingSpec, end: Best) -> tuple[Best, dict[str, float]]:
    """Which a tuning leaves, by what it minimises, of validation images: the last epoch, or the start if that has less.
    And what both have."""
    start = Best(weights=spec.networks["student"].build().state_dict())
    (begun, start.top1), (ended, _) = _validated(cell, spec, start.weights), _validated(cell, spec, end.weights)
    return end if ended <= begun else start, {"loss_start": begun, "loss": ended}


@torch.no_grad()
def _validated(cell: Cell, spec: TrainingSpec, weights: Mapping[str, Tensor]) -> tuple[float, float]:
    """Loss and accuracy, 0 to 1, of validation images with a student of these weights."""
    networks = {role: network.build() for role, network in spec.networks.items()}
    networks["student"].load_state_dict(weights)
    module = made_module(spec, networks, cell.cfg.data.num_classes).to(cell.device).eval()
    loss, top1 = MeanMetric(sync_on_compute=False), MeanMetric(sync_on_compute=False)  # the first process alone asks
    for images, labels in cell.images.evaluation("val", cell.device):
        terms, logits = module.losses(images, labels, TrainingProgress())
        loss.update(torch.stack(list(terms.values())).sum().cpu(), weight=len(labels))
        top1.update((logits.argmax(1) == labels).float().cpu())
    return float(loss.compute()), float(top1.compute())


def made_module(spec: TrainingSpec, networks: Mapping[str, nn.Module], num_classes: int) -> DistillationModule:
    """The module that ``spec`` trains, around ``networks``."""
    target, options = spec.method["_target_"], {key: v for key, v in spec.method.items() if key != "_target_"}
    kind = hydra.utils.get_class(target)
    for path in called(options):
        imported("method", path)  # classes of one's own, which a method finds among those that there are
    if not issubclass(kind, DistillationModule):
        raise KdqError(f"{target} is not a kdq.distill.DistillationModule: derive your method from it")
    config, seed = Recipe(**spec.recipe).of_module(), spec.networks["student"].seed
    try:
        return kind(**{**networks, "num_classes": num_classes, "config": config, "seed": seed, **options})
    except TypeError as error:
        raise KdqError(f"{target} does not take these options ({error}): {', '.join(options)}") from error


def check_module(cell: Cell, spec: TrainingSpec) -> None:
    """Make the module once around random networks, so that what it refuses is refused before anything is trained."""
    _check_module(json.dumps(asdict(spec)), cell.cfg.data.num_classes, cell.cfg.trainer.compile)


@cache
def _check_module(spec_json: str, num_classes: int, compiled: bool) -> None:
    spec = TrainingSpec.from_json(json.loads(spec_json))
    with torch.random.fork_rng(devices=[]):
        networks = {name: replace(network, weights=None).build() for name, network in spec.networks.items()}
        if spec.job_type == "tune":  # one rounding makes its student a quantized network
            large = (name for name, value in networks["student"].named_parameters() if value.ndim >= 2)
            first = layer_name(next(name for name in large if "parametrizations" not in name))
            networks["student"] = with_layout(networks["student"], {first: {"levels": 4, "scales": 1}})
        module = made_module(spec, networks, num_classes)
    if compiled and module.looks_inside:
        raise KdqError(COMPILED.format(type(module).__name__))


def _callbacks(cell: Cell, spec: TrainingSpec) -> list[Callback]:
    """The user's; checkpoints that they keep lie in a folder for each training, unless they say where, and a search
    compares trainings on the same data, of as many epochs, and of these none that others only need: the accuracy of a
    teacher is none of its students'."""
    searched = "teacher" if cell.role == "teacher" else cell.cfg.method.name
    callbacks, own = [], spec.job_type == "tune" or spec.label == searched
    for name, config in plain(cell.cfg.callbacks).items():
        callback = made(f"callbacks.{name}", config, Callback)
        if isinstance(callback, SuccessiveHalving) and not own:
            continue
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(cell.output / "checkpoints" / f"{spec.slug}-{spec.key}")
        if isinstance(callback, SuccessiveHalving) and callback.folder is None:
            alike = {
                "data": cell.images.spec(),
                "job_type": spec.job_type,
                "epochs": spec.recipe["epochs"],
                "with": config,
            }
            callback.folder = cell.output / "store" / "halving" / f"{cell.cfg.data.name}-{key_of(alike)}"
            callback.name = f"{spec.slug}-{spec.key}"
        callbacks.append(callback)
    return callbacks


def _tracked(cell: Cell, spec: TrainingSpec) -> AbstractContextManager[RunLogger]:
    student, networks = spec.networks["student"], spec.networks
    axes = {
        "role": "teacher" if spec.job_type == "teacher" else "student",
        "method": spec.label,
        "arch": student.name,
        "seed": student.seed,
        "teacher": networks["teacher"].name if "teacher" in networks else "",
    }
    settings = {"net": student.net, "recipe": spec.recipe, "method": spec.method}
    if spec.job_type == "tune":  # of the rows' model, found by what its rows are found by
        cfg = cell.cfg
        axes |= {"role": cell.role, "method": cfg.method.name, "quantizer": cfg.quant.name, "tune": spec.label}
        settings |= {"method": plain(cfg.method), "tune": spec.method}
    return cell.tracked(spec.job_type, spec.name, spec.key, axes, settings, spec.inputs)


def log_model(
    track: RunLogger, store: Store, slug: str, key: str, weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """The float model that a stage is about to publish as the store's entry ``slug``, ``key``."""
    path = store.root / f"{slug}-{key}" / "weights.safetensors"
    track.made(Artifact(slug, key, "float", path, facts, lambda: weights_file(weights)))


def check_fit(cell: Cell, network: nn.Module, name: str) -> None:
    """Run one image through ``network``."""
    data = cell.cfg.data
    try:
        with torch.no_grad():
            logits = network.eval()(torch.zeros(1, *cell.shape))
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise KdqError(f"{name} cannot take images of shape {cell.shape}: {cause}") from error
    network.train()
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"values of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise KdqError(f"{name} gives {what} for one image: it must give logits, a tensor (images, classes)")
    if logits.shape != (1, data.num_classes):
        raise KdqError(
            f"{name} gives {logits.shape[-1]} logits but data={data.name} has {data.num_classes} classes: "
            "give its net as many num_classes"
        )
