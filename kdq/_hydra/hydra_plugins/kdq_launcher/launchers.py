"""Hydra's view of kdq's launchers: thin shells over :mod:`kdq.sweep.local`, ``slurm`` and ``ray``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _TaskLauncher(Launcher):
    """A launcher whose jobs run, and print, elsewhere."""

    #: For the status of a sweep: the terminal is free for it.
    jobs_write_elsewhere = True

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def tasks(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
        from kdq.sweep.task import Task

        setup_globals()
        state = Singleton.get_state()
        return [
            Task(self.hydra_context, self.task_function, self.config, list(overrides), number, state)
            for number, overrides in enumerate(job_overrides, first)
        ]


class LocalLauncher(_TaskLauncher):
    """``hydra/launcher=local``; see :func:`kdq.sweep.local.launch`."""

    def __init__(self, jobs: int | None = None, jobs_per_gpu: int = 1) -> None:
        super().__init__()
        self.jobs, self.jobs_per_gpu = jobs, jobs_per_gpu

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        from kdq.sweep.local import launch

        return launch(self.tasks(job_overrides, initial_job_idx), self.jobs, self.jobs_per_gpu)


class SlurmLauncher(_TaskLauncher):
    """``hydra/launcher=slurm``; see :func:`kdq.sweep.slurm.launch`. Every job reads its own config's parameters."""

    def __init__(self, **params: Any) -> None:
        super().__init__()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        from kdq.sweep.slurm import launch

        return launch(self.tasks(job_overrides, initial_job_idx))


class RayLauncher(_TaskLauncher):
    """``hydra/launcher=ray``; see :func:`kdq.sweep.ray.launch`."""

    def __init__(self, address: str | None = None, num_cpus: float = 1, num_gpus: float = 1) -> None:
        super().__init__()
        self.address, self.num_cpus, self.num_gpus = address, num_cpus, num_gpus

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        from kdq.sweep.ray import launch

        return launch(self.tasks(job_overrides, initial_job_idx), self.address, self.num_cpus, self.num_gpus)
