"""The command line: ``kdq [overrides]`` and ``kdq -m ...``. The only place that knows of Hydra's application."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kdq.complaint import CONFIG_PATH, describe
from kdq.errors import KdqError

if TYPE_CHECKING:
    from kdq.results import Row


def job(cfg: DictConfig) -> list[Row]:
    """One job of Hydra's: a cell, or several that differ in their bits only."""
    from kdq.pipeline import run

    alone = HydraConfig.get().mode == RunMode.RUN
    try:
        rows = run(cfg)
        if alone:
            finish(cfg, rows)
        return rows
    except Exception as error:
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


def finish_sweep(cfg: DictConfig, returns: Sequence[Any]) -> None:
    """:func:`finish` for the jobs of a sweep.

    Raises:
        KdqError: some failed; their causes are printed first, one line each.
    """
    # JobReturn.return_value raises what the job raised, one job at a time; here all of them are wanted.
    outcomes = [(returned.overrides, returned._return_value) for returned in returns]
    failed = [(overrides, value) for overrides, value in outcomes if isinstance(value, BaseException)]
    finish(cfg, [row for _, value in outcomes if not isinstance(value, BaseException) for row in value])
    common = set.intersection(*(set(overrides) for overrides, _ in outcomes)) if len(outcomes) > 1 else set()
    for overrides, error in failed:
        which = " ".join(override for override in overrides if override not in common)
        print(f"kdq: failed: {which}: {describe(error)}", file=sys.stderr)
    if failed:
        error = KdqError(f"{len(failed)} of {len(outcomes)} jobs failed (run the same command again for those only)")
        raise error from failed[0][1]


def main() -> None:
    """Run Hydra on the command line; every error becomes one line and a non-zero exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of formatting them itself
    OmegaConf.register_new_resolver("class_folders", class_folders, replace=True)
    try:
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
