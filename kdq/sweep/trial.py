"""What ``wandb agent`` is told of the command that it started: a trial of a sweep that W&B plans."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from kdq.records.rows import AXES, Row
from kdq.sweep.objective import OBJECTIVES
from kdq.tracking.agent import AGENT
from kdq.tracking.open import tracked
from kdq.tracking.run import RunInfo
from kdq.utils.config import plain
from kdq.utils.errors import KdqError


def check_trial(cfg: DictConfig) -> None:
    """Refuse, before anything is trained, a command of which ``wandb agent`` would learn nothing."""
    if AGENT and (plain(cfg.logger).get("wandb") or {}).get("mode") != "online":
        raise KdqError("wandb agent learns nothing of this run: give logger=wandb logger.wandb.mode=online")


def log_trial(cfg: DictConfig, rows: Sequence[Row]) -> None:
    """Log the columns of :data:`kdq.sweep.objective.OBJECTIVES` in the run that the agent waits for; the sweep's
    ``metric`` is one of them. A row that was there already is told, too. Without an agent nothing is logged."""
    if not AGENT:
        return
    if len(rows) != 1:
        raise KdqError(f"a trial of a W&B sweep is one row, not {len(rows)}: give one width in quant.bits")
    (row,) = rows
    config = {axis: getattr(row, axis) for axis in AXES} | {"config_hash": row.config_hash}
    if file := AGENT.get("WANDB_SWEEP_PARAM_PATH"):  # the sweep's parameters, as W&B's client reads them itself
        entries = plain(OmegaConf.load(file)).items()
        config |= {str(name): entry["value"] for name, entry in entries if isinstance(entry, dict)}
    about = RunInfo("trial", row.file_name.removesuffix(".json"), str(cfg.sweep), row.config_hash, config)
    with tracked({"wandb": plain(cfg.logger.wandb)}, Path(cfg.paths.output_dir) / "runs", about) as track:
        track.metrics({name: value for name in OBJECTIVES if (value := getattr(row, name)) is not None})
