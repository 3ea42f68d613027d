"""``kdq -m``: from the cells of a grid to their rows, the report and what failed."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from rich.console import Console

from kdq.records.rows import Row, read_rows
from kdq.report import print_results, write_report
from kdq.sweep.log import log_sweep
from kdq.sweep.plan import Compose, make_plan
from kdq.sweep.run import run_plan
from kdq.sweep.show import failure_lines, print_plan, summary
from kdq.sweep.status import Status
from kdq.utils.errors import KdqError
from kdq.utils.messages import describe


def sweep(
    cfg: DictConfig, cells: Sequence[Sequence[str]], compose: Compose, launcher: Launcher, dry_run: bool
) -> list[Row]:
    """The jobs of ``kdq -m``: what is missing of the cells, given by their overrides, in waves; with ``dry_run`` only
    said. Where rows are missing at the end, why is printed first, one line for each cause."""
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
    rows = read_rows(output / "rows", plan.rows)
    try:
        log_sweep(cfg, rows)
    except Exception as error:  # W&B's trouble takes neither the report nor the list of failures with it
        print(f"kdq: the run of the sweep could not be logged: {describe(error)}", file=sys.stderr)
    finish(cfg, rows)
    if failures or plan.impossible:
        for line in failure_lines(plan, failures):
            print(f"kdq: {line}", file=sys.stderr)
        asked = len(plan.rows) + len(plan.impossible)
        raise KdqError(f"{asked - len(rows)} of {asked} rows are missing (the same command again makes only those)")
    return rows


def finish(cfg: DictConfig, rows: Sequence[Row]) -> None:
    """Rebuild the report over everything in the output folder and print what this command found."""
    output = Path(cfg.paths.output_dir)
    print_results(Console(), output, rows, write_report(output))
