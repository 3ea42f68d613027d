"""Hydra's grid sweeper, with one bad job never taking the others with it and a report at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf


class KdqSweeper(BasicSweeper):
    """Launches every cell of the grid through the configured launcher, then rebuilds the report over all of them.

    BasicSweeper stops at the first failed job's exception, without the other failures and without Hydra's end-of-run
    callbacks; here every failure is listed and the rest is kept.
    """

    def sweep(self, arguments: list[str]) -> Sequence[Any]:
        from kdq.app import finish_sweep

        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (cells,) = self.split_arguments(overrides, None)
        self.validate_batch_is_legal(cells)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returns = self.launcher.launch(cells, initial_job_idx=0)
        finish_sweep(self.config, returns)
        return returns
