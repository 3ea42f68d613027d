"""The command line: ``kdq [overrides]`` and ``kdq -m ...``. The only place that knows of Hydra's application."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kdq.allocator import keep_freed_memory
from kdq.cluster import leading
from kdq.complaint import CONFIG_PATH, describe
from kdq.cores import use_cores
from kdq.errors import KdqError
from kdq.failures import Job

#: What ``kdq.objective`` may be.
OBJECTIVES = (None, "val_top1")

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher

    from kdq.results import Row
    from kdq.sweep.plan import Compose


def job(cfg: DictConfig) -> list[Row] | float:
    """One job of Hydra's: a cell, or several that differ in their bits only, or one model that cells need."""
    with leading() as leader:
        return _job(cfg) if leader else []


def _job(cfg: DictConfig) -> list[Row] | float:
    from kdq import pipeline

    use_cores()
    keep_freed_memory()
    alone = HydraConfig.get().mode == RunMode.RUN
    try:
        if alone and HydraConfig.get().sweeper.get("dry_run"):
            raise KdqError("hydra.sweeper.dry_run=true shows the plan of several runs: add -m")
        if cfg.kdq.train is not None:
            pipeline.train(cfg, cfg.kdq.train, _place())
            return []
        if cfg.kdq.objective not in OBJECTIVES:
            # What is measured on test images may select nothing.
            raise KdqError(f"kdq.objective={cfg.kdq.objective} cannot be searched for: use val_top1")
        rows = pipeline.run(cfg, _place())
        if alone:
            finish(cfg, rows)
        return rows if cfg.kdq.objective is None else float(getattr(rows[0], cfg.kdq.objective))
    except Exception as error:
        _keep_trace()
        if not alone or cfg.kdq.debug:
            raise
        # Hydra would put a line of its own before ours.
        print(f"kdq: {describe(error)}", file=sys.stderr)
        sys.exit(1)


def finish(cfg: DictConfig, rows: Sequence[Row]) -> None:
    """Rebuild the report over everything in the output folder and print what this command found."""
    from rich.console import Console

    from kdq.report import print_results, write_report

    output = Path(cfg.paths.output_dir)
    print_results(Console(), output, rows, write_report(output), output / "runs")


def _place() -> Job:
    """This job, as the record of a failure names it."""
    hydra = HydraConfig.get()
    return Job(str(Path(hydra.runtime.output_dir) / f"{hydra.job.name}.log"), tuple(hydra.overrides.task))


def _keep_trace() -> None:
    """Where an error was raised belongs in the job's log; in the terminal stands one line."""
    with contextlib.suppress(OSError), open(_place().log, "a") as log:
        traceback.print_exc(file=log)


def sweep(
    cfg: DictConfig, cells: Sequence[Sequence[str]], compose: Compose, launcher: Launcher, dry_run: bool
) -> list[Row]:
    """The jobs of ``kdq -m``: what is missing of the cells, in waves.

    Args:
        cells: the overrides of each.
        dry_run: only say what would be done.

    Raises:
        KdqError: some rows are missing at the end; why is printed first, one line for each cause.
    """
    from rich.console import Console

    from kdq.dashboard.sweep import tell_sweep
    from kdq.results import read_rows
    from kdq.sweep.plan import make_plan
    from kdq.sweep.run import run_plan
    from kdq.sweep.show import failure_lines, print_plan, summary
    from kdq.sweep.status import Status

    output = Path(cfg.paths.output_dir)
    plan = make_plan([tuple(cell) for cell in cells], compose, output)
    if dry_run:
        print_plan(Console(), plan)
        return []
    console = Console(stderr=True)
    for line in summary(plan) if plan.jobs else []:
        console.print(line, soft_wrap=True, highlight=False)
    status = Status(console, plan, live=getattr(launcher, "jobs_write_elsewhere", False))
    failures = run_plan(plan, launcher.launch, Path(cfg.hydra.sweep.dir), status)
    rows = read_rows(output / "rows", set(plan.rows))
    try:
        tell_sweep(cfg, rows)
    except Exception as error:  # W&B's trouble takes neither the report nor the list of failures with it
        print(f"kdq: the run of the sweep could not be logged: {describe(error)}", file=sys.stderr)
    finish(cfg, rows)
    if failures or plan.impossible:
        for line in failure_lines(plan, failures):
            print(f"kdq: {line}", file=sys.stderr)
        asked = len(plan.rows) + len(plan.impossible)
        raise KdqError(f"{asked - len(rows)} of {asked} rows are missing (the same command again makes only those)")
    return rows


def main() -> None:
    """Run Hydra on the command line; every error becomes one line and a non-zero exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of formatting them itself
    try:
        with leading() as leader:
            if leader:
                hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="config")(job)()
    except KeyboardInterrupt:
        print("kdq: interrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if any(argument.lower() == "kdq.debug=true" for argument in sys.argv[1:]):
            raise
        print(f"kdq: {describe(error)}", file=sys.stderr)
        sys.exit(1)


def class_folders(root: str) -> int:
    """How many classes the image folder ``root`` has: the resolver ``${class_folders:...}`` of conf/data."""
    from kdq.data.folder import class_names

    return len(class_names(root))


# Hydra logs what it raises: the one line that describes it is enough.
logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)

# On import: also a process that a launcher started composes configs.
OmegaConf.register_new_resolver("class_folders", class_folders, replace=True)
