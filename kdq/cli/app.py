"""The command line: ``kdq [overrides]`` and ``kdq -m ...``. The only place that knows of Hydra's application."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kdq.records.failures import Job
from kdq.train.slurm import leading
from kdq.utils.calls import imported
from kdq.utils.config import CONFIG_PATH, plain
from kdq.utils.cpu import keep_freed_memory, use_cores
from kdq.utils.errors import KdqError, StoppedTrialError
from kdq.utils.messages import describe
from kdq.utils.signals import interrupted
from kdq.utils.version import __version__

if TYPE_CHECKING:
    from kdq.records.rows import Row


def job(cfg: DictConfig) -> list[Row] | float | list[float]:
    """One job of Hydra's: a cell, or several that differ in their bits only, or one model that cells need."""
    with leading() as leader:
        return _job(cfg) if leader else []


def _job(cfg: DictConfig) -> list[Row] | float | list[float]:
    from kdq.stages import pipeline
    from kdq.sweep import objective, trial

    keep_freed_memory()
    alone = HydraConfig.get().mode == RunMode.RUN
    try:
        use_cores(cfg.trainer.threads)
        if alone and HydraConfig.get().sweeper.get("dry_run"):
            raise KdqError("hydra.sweeper.dry_run=true shows the plan of several runs: add -m")
        if cfg.kdq.train is not None:
            pipeline.train(cfg, cfg.kdq.train, _place())
            return []
        if (searched := plain(cfg.kdq)["objective"]) is not None:
            objective.names(searched)
        objective.check_halving(searched, plain(cfg.callbacks))
        trial.check_trial(cfg)
        try:
            rows = pipeline.run(cfg, _place())
        except StoppedTrialError as stopped:
            logging.getLogger(__name__).info("%s", stopped)
            return 100 * stopped.value  # percent, as val_top1
        if alone:
            from kdq.sweep.command import finish

            finish(cfg, rows)
            trial.log_trial(cfg, rows)
        return rows if searched is None else objective.value(searched, rows)
    except Exception as error:
        # Where an error was raised belongs in the job's log; in the terminal stands one line.
        with contextlib.suppress(OSError), open(_place().log, "a") as log:
            traceback.print_exc(file=log)
        if not alone or cfg.kdq.debug:
            raise
        fail(error)  # Hydra would put a line of its own before ours


def _place() -> Job:
    """This job, as the record of a failure names it."""
    hydra = HydraConfig.get()
    return Job(str(Path(hydra.runtime.output_dir) / f"{hydra.job.name}.log"), tuple(hydra.overrides.task))


def main() -> None:
    """Run Hydra on the command line; every error becomes one line and a non-zero exit code."""
    if "--version" in sys.argv[1:]:
        print(f"kdq {__version__}")
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of formatting them itself
    try:
        with leading() as leader:
            if leader:
                _direct_optuna()
                hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="config")(job)()
    except Exception as error:
        if any(argument.lower() == "kdq.debug=true" for argument in sys.argv[1:]):
            raise
        fail(error)


def fail(error: Exception) -> NoReturn:
    if not interrupted():
        print(f"kdq: {describe(error)}", file=sys.stderr)
    sys.exit(1)


def _direct_optuna() -> None:
    """Let Optuna's sweeper go where ``kdq.objective`` is better; its own default minimises whatever it is given."""
    Plugins.instance()  # stores the configs of those that are installed
    if optuna := ConfigStore.instance().repo["hydra"]["sweeper"].get("optuna.yaml"):
        optuna.node.direction = "${directions:${kdq.objective}}"


# Hydra logs what it raises: the one line that describes it is enough.
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's, which tells every plug-in of its own

# On import: also a process that a launcher started composes configs.
for resolver, path in {
    "class_folders": "kdq.data.folder.class_count",
    "preprocessing": "kdq.models.libraries.asked_of_images",
    "directions": "kdq.sweep.objective.directions",
}.items():  # imported when a config first asks for them
    OmegaConf.register_new_resolver(resolver, lambda *said, path=path: imported("conf", path)(*said), replace=True)
