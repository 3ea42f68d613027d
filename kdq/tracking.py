"""Where a stage's metrics go: a W&B run (offline unless asked otherwise), CSV files, or nowhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger

from kdq.errors import KdqError

log = logging.getLogger(__name__)


@contextmanager
def tracked(
    logger: Mapping[str, Any], runs: Path, *, job_type: str, name: str, group: str, config: Mapping[str, Any]
) -> Iterator[Logger | None]:
    """A Lightning logger for one stage, closed when the block ends; a block that raises leaves a failed run.

    Args:
        logger: the ``logger`` config: ``kind`` is ``wandb``, ``csv`` or ``none``.
        runs: folder below which the logs are written.
        job_type: ``teacher``, ``distill`` or ``quantize``.
        config: flat values to find the run by.
    """
    kind = logger["kind"]
    if kind == "none":
        yield None
    elif kind == "csv":
        csv = CSVLogger(runs / "csv", name=f"{job_type}-{name}")
        csv.log_hyperparams(dict(config))
        yield csv
        csv.finalize("success")
    elif kind == "wandb":
        yield from _wandb(logger, runs, job_type=job_type, name=name, group=group, config=config)
    else:
        raise KdqError(f"logger.kind={kind!r} is unknown: use logger=wandb, logger=csv or logger=none")


def _wandb(
    logger: Mapping[str, Any], runs: Path, *, job_type: str, name: str, group: str, config: Mapping[str, Any]
) -> Iterator[Logger]:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    runs.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "project": logger["project"],
        "entity": logger["entity"],
        "dir": str(runs),
        "job_type": job_type,
        "name": name,
        "group": group,
        "config": dict(config),
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    mode = _mode(logger["mode"])
    try:
        run = wandb.init(mode=mode, **options)
    except wandb.Error as error:
        if mode != "online":
            raise KdqError(f"W&B could not start ({error}): set logger=csv or logger=none") from error
        log.warning("W&B cannot be reached (%s): this run is logged offline", error)
        run = wandb.init(mode="offline", **options)
    exit_code = 1
    try:
        yield WandbLogger(experiment=run)
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


def _mode(asked: str) -> Any:
    if asked not in ("online", "offline", "disabled"):
        raise KdqError(f"logger.mode={asked!r} is unknown: use offline, online or disabled")
    if asked == "online":
        import wandb

        if not wandb.api.api_key:
            log.warning("logger.mode=online, but nobody is logged in to W&B (run `wandb login`): logging offline")
            return "offline"
    return asked


def run_folder(logger: Logger | None) -> str:
    """The folder of a W&B run, to be browsed or synchronised; empty for other loggers."""
    experiment = getattr(logger, "experiment", None)
    folder = getattr(experiment, "dir", "")
    return str(Path(folder).parent) if type(logger).__name__ == "WandbLogger" and folder else ""
