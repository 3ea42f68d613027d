"""The log of a stage, opened where the ``logger`` config says: W&B, any of Lightning's loggers, several, or nowhere."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra.utils
from lightning.pytorch.loggers import Logger

from kdq.tracking.lightning_log import LightningLog
from kdq.tracking.run import RunInfo, RunLogger
from kdq.utils.errors import KdqError

#: Loggers whose package is not kdq's to install: the modules of which one must be there, and what to install.
_PACKAGES = {
    "TensorBoardLogger": (("tensorboard", "tensorboardX"), "tensorboard"),
    "MLFlowLogger": (("mlflow",), "mlflow"),
    "CometLogger": (("comet_ml",), "comet-ml"),
    "NeptuneLogger": (("neptune",), "neptune"),
}
#: Keys of the ``logger`` node that lie one level deeper since several loggers can be told.
_MOVED = ("mode", "project", "entity", "upload")


@contextmanager
def tracked(loggers: Mapping[str, Any], runs: Path, about: RunInfo) -> Iterator[RunLogger]:
    """The log of one stage, closed when the block ends; a block that raises leaves a failed run.

    Args:
        loggers: the ``logger`` config, each logger under its name: ``wandb`` is a
            :class:`kdq.tracking.wandb_run.WandbConfig`, every other a ``_target_`` with its arguments.
        runs: folder below which the logs are written.

    Raises:
        KdqError: a logger cannot be made.
    """
    check_loggers(loggers)
    found = RunLogger()
    with ExitStack() as stack:
        for name, config in loggers.items():
            if _is_wandb(name, config):
                from kdq.tracking.wandb_run import WandbConfig, wandb_run

                wandb = stack.enter_context(wandb_run(WandbConfig(**config), runs, about))
                found.logs.append(wandb)
                found.loggers.append(wandb.logger)
            else:
                log = stack.enter_context(_lightning(name, config, runs, about))
                found.logs.append(log)
                found.loggers.append(log.logger)
        yield found


def check_loggers(loggers: Any) -> None:
    """Refuse a ``logger`` config that cannot work, before anything is trained.

    Raises:
        KdqError: a key of no logger, an option of none, or a package that is not installed.
    """
    if not isinstance(loggers, Mapping):
        raise KdqError(f"logger={loggers} is no choice of loggers: use logger=wandb, logger=[wandb,csv] or logger=none")
    for name, config in loggers.items():
        if name in _MOVED:
            raise KdqError(f"logger.{name} is now logger.wandb.{name}")
        if name == "kind":
            raise KdqError(f"logger.kind={config} is now logger={config}; several: logger=[wandb,csv]")
        if _is_wandb(name, config):
            from kdq.tracking.wandb_run import WandbConfig

            _known(name, config, [field.name for field in dataclasses.fields(WandbConfig)])
            WandbConfig(**config)
        elif not isinstance(config, Mapping) or "_target_" not in config:
            raise KdqError(f"logger.{name} is no logger: give logger.{name}._target_=a Lightning logger")
        else:
            parameters = _parameters(name, config["_target_"])
            if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
                _known(name, config, list(parameters))


@contextmanager
def _lightning(name: str, config: Mapping[str, Any], runs: Path, about: RunInfo) -> Iterator[LightningLog]:
    """A logger that writes below ``runs``, under the stage's name, unless its config says otherwise."""
    stage = f"{about.job_type}-{about.name}"
    places = {"save_dir": str(runs / name), "name": stage, "run_name": stage}
    parameters = _parameters(name, config["_target_"])
    ours = {key: value for key, value in places.items() if key in parameters and config.get(key) is None}
    try:
        logger = hydra.utils.instantiate({**config, **ours})
    except Exception as error:
        raise KdqError(f"logger.{name}: {' '.join(str(error.__cause__ or error).split())}") from error
    if not isinstance(logger, Logger):
        raise KdqError(f"logger.{name} is no Lightning logger: give it a _target_ that makes one")
    log = LightningLog(logger, name)
    logger.log_hyperparams(dict(about.config))
    status = "failed"
    try:
        yield log
        status = "success"
    finally:
        logger.finalize(status)


def _is_wandb(name: str, config: Any) -> bool:
    return name == "wandb" and isinstance(config, Mapping) and "_target_" not in config


def _parameters(name: str, target: str) -> Mapping[str, inspect.Parameter]:
    """What the logger at the path ``target`` takes; a package that it needs is there."""
    modules, install = _PACKAGES.get(target.rpartition(".")[2], ((), ""))
    if modules and not any(find_spec(module) for module in modules):
        raise KdqError(f"logger.{name} needs a package that is not installed: pip install {install}")
    try:
        return inspect.signature(hydra.utils.get_object(target)).parameters
    except Exception as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise KdqError(f"logger.{name}._target_={target} cannot be loaded: {cause}") from error


def _known(name: str, config: Mapping[str, Any], options: list[str]) -> None:
    for key in config:
        if key not in options and not (key.startswith("_") and key.endswith("_")):
            near = difflib.get_close_matches(key, options, n=2, cutoff=0.4)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise KdqError(f"logger.{name}.{key} is no option of this logger{hint}: {', '.join(options)}")
