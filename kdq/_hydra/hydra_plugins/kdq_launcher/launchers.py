"""Hydra's view of kdq's launchers: thin shells over :mod:`kdq.sweep.local`, ``slurm`` and ``ray``."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _TaskLauncher(Launcher):
    """A launcher whose jobs run, and print, elsewhere: ``launch(tasks, **options)`` of a module of :mod:`kdq.sweep`."""

    #: For the status of a sweep: the terminal is free for it.
    jobs_write_elsewhere = True
    module = ""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        from kdq.sweep.task import Task

        setup_globals()
        shared = (self.hydra_context, self.task_function, self.config)
        tasks = [
            Task(*shared, list(overrides), number, Singleton.get_state())
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        return import_module(f"kdq.sweep.{self.module}").launch(tasks, **self.options)


class LocalLauncher(_TaskLauncher):
    """``hydra/launcher=local``; see :func:`kdq.sweep.local.launch`."""

    module = "local"


class SlurmLauncher(_TaskLauncher):
    """``hydra/launcher=slurm``; see :func:`kdq.sweep.slurm.launch`. Every job reads its own config's parameters."""

    module = "slurm"

    def __init__(self, **params: Any) -> None:
        super().__init__()


class RayLauncher(_TaskLauncher):
    """``hydra/launcher=ray``; see :func:`kdq.sweep.ray.launch`."""

    module = "ray"
