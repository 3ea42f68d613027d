"""The stages that train: teacher -> student. What a cell needs is known before anything is made.

:func:`planned` describes the model that a cell quantizes and, through ``needs``, every model that goes into it; that
costs no training, and keys and paths follow from it. :func:`obtain` takes a described model from the store or makes
it. A sweep plans its waves, and a cell alone makes what it needs, from the same descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import hydra.utils
from torch import Tensor, nn

from kdq.models.build import build
from kdq.models.libraries import weights_of
from kdq.models.weights import fitting_state, head, load_weights
from kdq.records.store import Entry, Make, Store, key_of
from kdq.records.user_code import user_code
from kdq.stages.cell import Cell
from kdq.stages.schema import peers_of
from kdq.stages.training import NetworkSpec, TrainingSpec, check_fit, check_module, log_model
from kdq.stages.worker import run_training
from kdq.tracking.names import reference
from kdq.train.evaluate import evaluate
from kdq.train.fit import ranked
from kdq.train.recipe import Recipe
from kdq.utils.config import plain
from kdq.utils.files import file_digest

#: How a teacher is trained, and the network that a student may start from.
CROSS_ENTROPY = {"_target_": "kdq.distill.CrossEntropy"}
#: The value of ``weights`` that asks for the stored cross-entropy network of the same data, net, recipe and seed.
BASELINE = "baseline"


@dataclass(frozen=True)
class Model:
    """A float model, made or not."""

    spec: Mapping[str, Any]  # everything that affects its weights
    slug: str  # of its folder in the store, unless it was made under another name
    name: str  # for people, in plans, jobs and logs; says its role
    role: str  # teacher, student or tuned
    needs: tuple[Model, ...]  # the models that must be there first
    make: Make
    training: TrainingSpec | None = None  # None for one that is read from a file

    @cached_property
    def key(self) -> str:
        return key_of(self.spec)

    def lineage(self) -> Iterator[Model]:
        """This model and every one that goes into it; one that several need comes several times."""
        yield self
        for model in self.needs:
            yield from model.lineage()


def float_model(cell: Cell) -> Entry:
    """The model whose weights the cell quantizes, from the store or made now."""
    return obtain(cell.store, planned(cell))


def obtain(store: Store, model: Model) -> Entry:
    """``model`` from the store, or made now, after what it needs."""
    entry = store.get(model.spec, model.slug)
    if entry is None:
        for needed in model.needs:
            obtain(store, needed)
        entry = store.get_or_make(model.spec, model.slug, model.make)
    return entry


def planned(cell: Cell) -> Model:
    """The model whose weights the cell quantizes: the teacher itself, or the student that the method trains."""
    if cell.role == "teacher":
        _check_networks([cell.of_role("teacher")])
        return teacher_model(cell)
    method = plain(cell.cfg.method)
    name, role = method.pop("name"), cell.of_role("student")
    role["weights"] = method.pop("weights", role["weights"])
    takes = getattr(hydra.utils.get_class(method["_target_"]), "takes", ())
    others: dict[str, _Start] = {}
    peers = peers_of(method) if "peer" in takes else {}
    _check_networks([role, *([cell.of_role("teacher")] if "teacher" in takes else []), *peers.values()])
    if "teacher" in takes:
        model = teacher_model(cell)
        spec = NetworkSpec(cell.cfg.teacher.name, plain(cell.cfg.teacher.net), 0, None)
        others["teacher"] = _Start(spec, model.key, model)
    for place, (key, peer) in enumerate(peers.items(), start=1):
        del method[key]
        seed = role["seed"] + place if peer["seed"] is None else peer["seed"]
        others[key] = _start(cell, {**peer, "seed": seed, "recipe": role["recipe"]})
    model = _trained(cell, "student", name, role, method, others)
    assert model.training is not None
    check_module(cell, model.training)
    return model


def teacher_model(cell: Cell) -> Model:
    """The teacher: read from ``teacher.weights``, or trained with cross-entropy: when there are none, or from them when
    they are of other classes, so that its classifier is a new one."""
    role = cell.of_role("teacher")
    path = None if role["weights"] is None else weights_of(role["weights"], role["net"])
    if path is None or other_classes(json.dumps(role["net"]), path):
        return _trained(cell, "teacher", "baseline", role, CROSS_ENTROPY, {})
    spec = {"stage": "load", "net": role["net"], "weights": file_digest(path), "data": cell.images.spec()}
    spec |= user_code(role["net"])
    slug, name = (f"{cell.cfg.data.name}-{what}-{role['name']}" for what in ("loaded", "teacher"))

    @contextmanager
    def read(work: object) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Any]]]:
        network = build(role["net"])
        load_weights(network, path)
        check_fit(cell, network, role["name"])
        batches = cell.images.evaluation("val", cell.device)
        metrics = evaluate(network.to(cell.device), batches, cell.cfg.data.num_classes)
        network.cpu()
        facts = {"val_top1": metrics["top1"], "train_seconds": 0.0}
        axes = {"role": "teacher", "method": "loaded", "arch": role["name"], "seed": role["seed"]}
        settings = {"net": role["net"], "weights": str(role["weights"])}
        with cell.tracked("teacher", name, key_of(spec), axes, settings) as track:
            track.summary(facts)
            log_model(track, cell.store, slug, key_of(spec), network.state_dict(), facts)
            yield network.state_dict(), facts

    return Model(spec, slug, name, "teacher", (), read)


@dataclass(frozen=True)
class _Start:
    """A network as it enters a training, what identifies its weights (None: random ones, which the seed identifies),
    and the model that they come from, if it is one of the store."""

    network: NetworkSpec
    identity: str | None
    model: Model | None = None

    def stored(self, store: Store) -> NetworkSpec:
        """The network with the file of its weights, once :attr:`model` is there: only then is the name known under
        which it was made."""
        if self.model is None:
            return self.network
        return replace(self.network, weights=str(_path(store, self.model).absolute() / "weights.safetensors"))


def _trained(
    cell: Cell,
    role_name: str,
    method_name: str,
    role: Mapping[str, Any],
    method: Mapping[str, Any],
    others: Mapping[str, _Start],
) -> Model:
    """The network of ``role`` (its ``name, net, weights, recipe, seed``), trained with ``method`` beside the ``others``
    that it takes. Equal specs are one entry, whoever asks."""
    Recipe(**role["recipe"])  # an impossible one is refused before anything is trained
    start = _start(cell, role)
    spec = {
        "stage": "train",
        "data": cell.images.spec(),
        "net": role["net"],
        "weights": start.identity,
        "method": dict(method),
        "recipe": role["recipe"],
        "precision": cell.cfg.trainer.precision,
        **cell.training_flags(),
        "seed": role["seed"],
        "others": {
            name: {"net": other.network.net, "seed": other.network.seed, "weights": other.identity}
            for name, other in others.items()
        },
        **user_code(
            role["net"],
            method,
            plain(cell.cfg.callbacks),
            plain(cell.cfg.data.augment),
            *(other.network.net for other in others.values()),
        ),
    }
    label, job_type = ("teacher", "teacher") if role_name == "teacher" else (method_name, "distill")
    # A teacher is a baseline, too: the store has one entry for both.
    slug, name = (f"{cell.cfg.data.name}-{how}-{role['name']}-s{role['seed']}" for how in (method_name, label))
    starts = {"student": start, **others}
    networks = {name: start.network for name, start in starts.items()}
    training = TrainingSpec(label, job_type, method, role["recipe"], networks, slug, name, key_of(spec))
    needs = tuple(start.model for start in starts.values() if start.model is not None)
    return Model(spec, slug, name, role_name, needs, _train(cell, training, starts, spec), training)


def _train(cell: Cell, plan: TrainingSpec, starts: Mapping[str, _Start], spec: Mapping[str, Any]) -> Make:
    """Runs the training and publishes its better learner; the others lie beside it under keys of their own."""

    @contextmanager
    def make(work: Path) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Any]]]:
        networks = {name: start.stored(cell.store) for name, start in starts.items()}
        inputs = [artifact(cell.store, start.model) for start in starts.values() if start.model is not None]
        training = replace(plan, networks=networks, inputs=inputs)
        with run_training(cell, training, work) as (best, metrics):
            results = {
                name: {"val_top1": 100 * learner.top1, "best_epoch": learner.epoch, "learner": name} | metrics
                for name, learner in best.items()
            }
            for name in set(best) - {"student"}:  # whose architecture is not the one that the config names
                results[name] |= {"arch": training.networks[name].name, "net": training.networks[name].net}

            def keep(name: str) -> str:
                return cell.store.get_or_make(
                    {**spec, "learner": name},
                    f"{plan.slug}-{name}",
                    lambda _: nullcontext((best[name].weights, results[name])),
                ).key

            winner, *losers = ranked(best)
            for name in losers:
                results[winner] |= {f"val_top1_{name}": 100 * best[name].top1, f"key_{name}": keep(name)}
            yield best[winner].weights, results[winner]

    return make


def _start(cell: Cell, role: Mapping[str, Any]) -> _Start:
    """The network of ``role`` and where its training starts."""
    source, model = role["weights"], None
    if source == BASELINE:
        model = _trained(cell, "student", "baseline", {**role, "weights": None}, CROSS_ENTROPY, {})
        weights, identity = None, model.key
    elif source is None or (path := weights_of(source, role["net"])) is None:
        weights, identity = source, source
    else:
        weights, identity = str(path), file_digest(path)
    return _Start(NetworkSpec(role["name"], role["net"], role["seed"], weights), identity, model)


def _check_networks(roles: Iterable[Mapping[str, Any]]) -> None:
    """Build the networks and read their weights, which may be the user's own, before any image is decoded for them."""
    for role in roles:
        named = role["weights"] in (None, BASELINE)
        checked_network(json.dumps(role["net"]), None if named else weights_of(role["weights"], role["net"]))


@lru_cache(maxsize=16)
def checked_network(net: str, weights: Path | None) -> nn.Module:
    """The network that ``net`` (JSON) describes, with the weights of a file or random ones, built once a process. It is
    no shape alone: a network of the user's own may look at numbers while it is built."""
    network = build(json.loads(net))
    if weights is not None:
        load_weights(network, weights, new_head=True)
    return network


@lru_cache(maxsize=16)
def other_classes(net: str, weights: Path) -> bool:
    """Whether the network that ``net`` (JSON) describes has another number of classes than the weights of a file."""
    network = checked_network(net, None)
    return bool(head(fitting_state(network, weights), network.state_dict()))


def artifact(store: Store, model: Model) -> str:
    """The reference to ``model``, which is in the store, for the log of what is made from it."""
    return reference(_path(store, model).name.removesuffix(f"-{model.key}"), model.key)


def _path(store: Store, model: Model) -> Path:
    return store.path(model.spec, model.slug)
