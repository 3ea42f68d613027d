"""The log of a stage, opened where the ``logger`` config says: W&B, any of Lightning's loggers, several, or nowhere."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from kdq.tracking.lightning_log import LightningLog
from kdq.tracking.run import RunInfo, RunLogger, WandbConfig
from kdq.utils.calls import imported, made, parameters
from kdq.utils.errors import KdqError
from kdq.utils.messages import MOVED, unknown_option

#: Loggers whose package is not kdq's to install: the modules of which one must be there, and what to install.
_PACKAGES = {
    "TensorBoardLogger": (("tensorboard", "tensorboardX"), "tensorboard"),
    "MLFlowLogger": (("mlflow",), "mlflow"),
    "CometLogger": (("comet_ml",), "comet-ml"),
    "NeptuneLogger": (("neptune",), "neptune"),
}


@contextmanager
def tracked(loggers: Mapping[str, Any], runs: Path, about: RunInfo) -> Iterator[RunLogger]:
    """The log of one stage, closed when the block ends; a block that raises leaves a failed run.

    Args:
        loggers: the ``logger`` config, each logger under its name: ``wandb`` is a
            :class:`kdq.tracking.run.WandbConfig`, every other a ``_target_`` with its arguments.
        runs: folder below which the logs are written.
    """
    check_loggers(loggers)
    track = RunLogger()
    with ExitStack() as stack:
        for name, config in loggers.items():
            if _is_wandb(name, config):
                from kdq.tracking.wandb_run import wandb_run

                opened: Any = wandb_run(WandbConfig(**config), runs, about)
            else:
                opened = _lightning(name, config, runs, about)
            track.logs.append(stack.enter_context(opened))
        yield track


def check_loggers(loggers: Any) -> None:
    """Refuse a ``logger`` config that cannot work, before anything is trained."""
    if not isinstance(loggers, Mapping):
        raise KdqError(f"logger={loggers} is no choice of loggers: use logger=wandb, logger=[wandb,csv] or logger=none")
    for name, config in loggers.items():
        if _is_wandb(name, config):
            known: list[str] | None = [field.name for field in fields(WandbConfig)]
        elif not isinstance(config, Mapping) or "_target_" not in config:
            hint = MOVED.get(f"logger.{name}", f"give logger.{name}._target_=a Lightning logger")
            raise KdqError(f"logger.{name} is no logger: {hint}")
        else:
            modules, install = _PACKAGES.get(str(config["_target_"]).rpartition(".")[2], ((), ""))
            if modules and not any(find_spec(module) for module in modules):
                raise KdqError(f"logger.{name} needs a package that is not installed: pip install {install}")
            known = parameters(imported(f"logger.{name}", config["_target_"]))
        for key in config:
            if known is not None and key not in known and not key.startswith("_"):
                raise KdqError(unknown_option(f"logger.{name}.{key}", {"logger": loggers}, known))
        if _is_wandb(name, config):
            WandbConfig(**config)  # its values are checked, too


@contextmanager
def _lightning(name: str, config: Mapping[str, Any], runs: Path, about: RunInfo) -> Iterator[LightningLog]:
    """A logger that writes below ``runs``, under the stage's name, unless its config says otherwise."""
    stage = f"{about.job_type}-{about.name}"
    places = {"save_dir": str(runs / name), "name": stage, "run_name": stage}
    taken = inspect.signature(imported(f"logger.{name}", config["_target_"])).parameters
    ours = {key: value for key, value in places.items() if key in taken and config.get(key) is None}
    logger = made(f"logger.{name}", {**config, **ours}, Logger)  # type: ignore[type-abstract]
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
