"""One job's config and what is made of it once: images, store, device, loggers."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kdq.data.image_set import ImageSet
from kdq.data.images import Images
from kdq.distill.module import DistillationModule
from kdq.models.build import build
from kdq.records.store import Entry, Store
from kdq.stages.check import check_config
from kdq.stages.schema import peers_of
from kdq.tracking.open import check_loggers, tracked
from kdq.tracking.run import RunInfo, RunLogger, flat
from kdq.train.trainer import check_trainer, weights_flags, with_trainer_flags
from kdq.utils.config import plain
from kdq.utils.errors import KdqError
from kdq.utils.names import stable
from kdq.utils.version import __version__, git_sha

#: Parts of the config that say where a cell is made and what becomes of it.
UNRECORDED = ("hydra", "paths", "logger", "sweep", "kdq", "deploy")


@dataclass(frozen=True)
class Cell:
    """One point of the grid, or several that differ in their bits only."""

    cfg: DictConfig
    checked: bool = False  # by who resolved it: that done, it does not say any more who reads its keys

    def __post_init__(self) -> None:
        """Raises KdqError for a key that nobody reads, a value of another type, and a name that no file can have."""
        if not self.checked:
            check_config(self.cfg)
        check_trainer(plain(self.cfg.trainer))
        check_loggers(plain(self.cfg.logger))
        for part in ("data", "method", "teacher", "student", "quant", "tune"):
            name = str(self.cfg[part].name)
            if not re.fullmatch(r"[\w.+-]+", name):
                raise KdqError(f"{part}.name={name!r} must be letters, digits, and any of _ . + -")

    def of_role(self, role: str) -> dict[str, Any]:
        """The config of ``teacher`` or ``student``; what ``trainer`` says for all trainings is in its recipe."""
        config = plain(self.cfg[role]) | {"net": self.net(role)}
        return config | {"recipe": with_trainer_flags(config["recipe"], plain(self.cfg.trainer))}

    def training_flags(self) -> dict[str, Any]:
        """What else a trained model depends on, where it is given: flags of the Trainer, and callbacks."""
        flags = {"trainer": weights_flags(plain(self.cfg.trainer)), "callbacks": plain(self.cfg.callbacks)}
        return {name: value for name, value in flags.items() if value}

    def recorded(self) -> dict[str, Any]:
        """The config that rows carry: interpolations as they are written, without what no result depends on."""
        config: dict[str, Any] = OmegaConf.to_container(self.cfg, resolve=False)  # type: ignore[assignment]
        return {name: value for name, value in config.items() if name not in UNRECORDED}

    @property
    def output(self) -> Path:
        """Everything kdq writes is below it."""
        return Path(self.cfg.paths.output_dir)

    @cached_property
    def store(self) -> Store:
        return Store(self.output / "store")

    @cached_property
    def images(self) -> Images:
        config = plain(self.cfg.data)
        return Images(_image_set(json.dumps(config["source"])), config)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(channels, height, width)``."""
        return (self.cfg.data.in_channels, self.images.height, self.images.width)

    @cached_property
    def device(self) -> torch.device:
        """The device that quantizes and evaluates networks; Lightning places trainings by the same setting."""
        accelerator = self.cfg.trainer.accelerator
        if accelerator == "cpu":
            return torch.device("cpu")
        present = torch.accelerator.current_accelerator(check_available=True)
        if accelerator != "auto" and present is None:
            raise KdqError(f"trainer.accelerator={accelerator} but torch finds no device: use accelerator=cpu or auto")
        return present or torch.device("cpu")

    @property
    def role(self) -> str:
        """Whose weights are quantized: ``teacher`` or ``student``."""
        return "teacher" if self.cfg.method._target_ is None else "student"

    @property
    def name(self) -> str:
        """What people tell cells apart by, apart from the bits."""
        cfg, role = self.cfg, self.cfg[self.role]
        tuned = "" if cfg.tune._target_ is None else f"-{cfg.tune.name}"
        return f"{cfg.data.name}-{cfg.method.name}-{role.name}-s{role.seed}-{cfg.quant.name}{tuned}"

    def net(self, role: str) -> dict[str, Any]:
        """How the network of a role is built: as the config says, or as the method makes it of that."""
        net, target = plain(self.cfg[role].net), self.cfg.method._target_
        if role == "teacher" or target is None:
            return net
        kind, own = hydra.utils.get_class(target), DistillationModule.product
        if getattr(kind, "product", own) is own:
            return net
        return _product(kind, json.dumps(net), json.dumps(plain(self.cfg.teacher.net)), self.shape)

    def net_of(self, role: str, entry: Entry) -> dict[str, Any]:
        """How the stored network of a role is built."""
        own, peers = self.net(role), peers_of(plain(self.cfg.method)).values()
        # Of networks that were trained together another one may be the best. Nothing else that a stored file names is
        # called.
        stored = stable(entry.metrics.get("net", own))
        net = next((net for net in (own, *(peer["net"] for peer in peers)) if stable(net) == stored), None)
        if net is None:
            raise KdqError(
                f"the stored model {entry.path} names a network that the config does not: delete this folder"
            )
        return net

    def network(self, role: str, entry: Entry) -> nn.Module:
        """The stored network of a role, in eval mode, on the CPU."""
        network = build(self.net_of(role, entry))
        network.load_state_dict(entry.weights())
        return network.eval()

    def tracked(
        self,
        job_type: str,
        name: str,
        key: str,
        axes: Mapping[str, Any],
        settings: Mapping[str, Any],
        inputs: Sequence[str] = (),
        tags: Sequence[str] = (),
    ) -> AbstractContextManager[RunLogger]:
        """The log of one stage; see :class:`kdq.tracking.run.RunInfo`. The ``axes`` tell it from others of its kind,
        under short names; the ``settings`` are the rest of what affects its result, nested as in the config."""
        data = plain(self.cfg.data)
        common = {"data": data["name"], "kdq_version": __version__, "git_sha": git_sha(), "key": key}
        config = common | dict(axes) | flat(dict(settings) | {"data": data, "trainer": plain(self.cfg.trainer)})
        own = [data["name"], *(axes.get(axis, "") for axis in ("method", "arch", "quantizer", "tune"))]
        about = RunInfo(
            job_type,
            name,
            group=str(self.cfg.sweep),
            key=key,
            config=config,
            tags=[*own, f"s{axes['seed']}", *tags],
            inputs=inputs,
        )
        return tracked(plain(self.cfg.logger), self.output / "runs", about)


@lru_cache(maxsize=2)
def _image_set(source: str) -> ImageSet:
    """The images that ``source`` (JSON) describes, read and hashed once for all cells of a process."""
    return hydra.utils.instantiate(json.loads(source))


@lru_cache(maxsize=16)
def _product(kind: Any, student: str, teacher: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The net of what the method ``kind`` makes of two (JSON)."""
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        product = kind.product(*(build(json.loads(net)) for net in (student, teacher)), images)
    return dict(product.kdq_net)
