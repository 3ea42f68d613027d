"""One job of a sweep as a picklable call, for launchers that run it in another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


@dataclass
class Task:
    """Composes the config of one job and runs it, wherever it is called.

    Attributes:
        config: of the command that sweeps.
        overrides: of this job.
        number: of this job in the sweep.
        singletons: the command's state of Hydra.
    """

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig
    overrides: list[str]
    number: int
    singletons: dict[Any, Any]

    def job_config(self) -> DictConfig:
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(cfg):
            cfg.hydra.job.num = self.number
            cfg.hydra.job.id = f"{cfg.hydra.job.name}_{self.number}"
        return cfg

    def __call__(self) -> JobReturn:
        Singleton.set_state(self.singletons)
        setup_globals()
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=self.job_config(),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def checkpoint(self) -> Any:
        """What submitit runs again when Slurm has taken the machine away: the same job, in the same folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def failed(task: Task, error: Exception) -> JobReturn:
    """The return of a job that could not say itself how it ended."""
    from hydra.core.utils import JobStatus

    returned = JobReturn(overrides=task.overrides, status=JobStatus.FAILED)
    returned.return_value = error
    return returned
