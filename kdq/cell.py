"""One job's config and what is made of it once: images, store, device, loggers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kdq.data.images import Images
from kdq.data.sets import ImageSet
from kdq.errors import KdqError
from kdq.models import build
from kdq.store import Entry, Store
from kdq.tracking import tracked


@dataclass(frozen=True)
class Cell:
    """One point of the grid, or several that differ in their bits only."""

    cfg: DictConfig

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

    @cached_property
    def device(self) -> torch.device:
        """Where networks are quantized and evaluated; Lightning places trainings by the same setting."""
        accelerator = self.cfg.trainer.accelerator
        if accelerator == "cpu":
            return torch.device("cpu")
        found = torch.accelerator.current_accelerator(check_available=True)
        if accelerator != "auto" and found is None:
            raise KdqError(f"trainer.accelerator={accelerator} but torch finds no device: use accelerator=cpu or auto")
        return found or torch.device("cpu")

    @property
    def role(self) -> str:
        """Whose weights are quantized: ``teacher`` or ``student``."""
        return "teacher" if self.cfg.method._target_ is None else "student"

    @property
    def name(self) -> str:
        """What people tell cells apart by, apart from the bits."""
        cfg, role = self.cfg, self.cfg[self.role]
        return f"{cfg.data.name}-{cfg.method.name}-{role.name}-s{role.seed}-{cfg.quant.name}"

    def network(self, role: str, entry: Entry) -> nn.Module:
        """The stored network of a role, in eval mode, on the CPU."""
        # A training of several networks may have published one of another architecture.
        network = build(entry.metrics.get("net", plain(self.cfg[role].net)))
        network.load_state_dict(entry.weights())
        return network.eval()

    def tracked(self, job_type: str, name: str, extra: Mapping[str, Any]) -> AbstractContextManager[Logger | None]:
        """The logger of one stage; see :func:`kdq.tracking.tracked`."""
        cfg = self.cfg
        axes = {"data": cfg.data.name, "teacher": cfg.teacher.name, "student": cfg.student.name, "seed": cfg.seed}
        return tracked(
            plain(cfg.logger),
            self.output / "runs",
            job_type=job_type,
            name=f"{cfg.data.name}-{name}",
            group=cfg.sweep,
            config=axes | {"quantizer": cfg.quant.name} | dict(extra),
        )


@lru_cache(maxsize=2)
def _image_set(source: str) -> ImageSet:
    """The images that ``source`` (JSON) describes, read and hashed once for all cells of a process."""
    return hydra.utils.instantiate(json.loads(source))


def plain(config: Any) -> Any:
    """A config node as dicts, lists and values, with its interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
