"""The log of a stage, opened where the ``logger`` config says: a W&B run, CSV files, or nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from kdq.tracking.run import RunInfo, RunLogger
from kdq.utils.errors import KdqError


@contextmanager
def tracked(logger: Mapping[str, Any], runs: Path, about: RunInfo) -> Iterator[RunLogger]:
    """The log of one stage, closed when the block ends; a block that raises leaves a failed run.

    Args:
        logger: the ``logger`` config: ``kind`` is ``wandb``, ``csv`` or ``none``.
        runs: folder below which the logs are written.
    """
    kind = logger["kind"]
    if kind == "none":
        yield RunLogger()
    elif kind == "csv":
        csv = CSVLogger(runs / "csv", name=f"{about.job_type}-{about.name}")
        csv.log_hyperparams(dict(about.config))
        status = "failed"
        try:
            yield RunLogger(csv)
            status = "success"
        finally:
            csv.finalize(status)
    elif kind == "wandb":
        from kdq.tracking.wandb_run import wandb_run

        with wandb_run(logger, runs, about) as track:
            yield track
    else:
        raise KdqError(f"logger.kind={kind!r} is unknown: use logger=wandb, logger=csv or logger=none")
