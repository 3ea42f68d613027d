"""Hydra's grid sweeper in waves: a thin shell over :mod:`kdq.sweep`."""

from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from kdq.utils.errors import KdqError


class KdqSweeper(BasicSweeper):
    """Launches what is missing of a grid through the configured launcher: models first, each once, then rows.
    ``dry_run``: print the plan and launch nothing."""

    def __init__(
        self,
        max_batch_size: int | None = None,
        params: dict[str, str] | None = None,
        dry_run: bool = False,
        **other: Any,
    ) -> None:
        super().__init__(max_batch_size, params)
        if other:
            raise KdqError(f"{', '.join(other)}: options of another sweeper; choose it, such as hydra/sweeper=optuna")
        self.dry_run = dry_run

    def sweep(self, arguments: list[str]) -> Any:
        from kdq.sweep.command import sweep

        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        (cells,) = self.split_arguments(overrides, None)
        if not self.dry_run:
            folder = Path(self.config.hydra.sweep.dir)
            folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, folder / "multirun.yaml")
        self.config.hydra.hydra_logging.root.level = "WARNING"  # kdq says itself what it launches

        def compose(overrides: tuple[str, ...]) -> DictConfig:
            return loader.load_sweep_config(self.config, list(overrides))

        return sweep(self.config, cells, compose, self.launcher, self.dry_run)
