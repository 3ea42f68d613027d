"""One job of a sweep as a picklable call, for launchers that run it in another process."""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from kdq.utils.errors import KdqError
from kdq.utils.messages import describe


@dataclass
class Task:
    """Composes the config of one job and runs it, wherever it is called."""

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig  # of the command that sweeps
    overrides: list[str]  # of this job
    number: int  # of this job in the sweep
    singletons: dict[Any, Any]  # the command's state of Hydra

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
            task_function=self._run,
            config=self.job_config(),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _run(self, cfg: DictConfig) -> Any:
        # Slurm's warning was held back from the job's first moment (kdq.sweep.slurm) until here, where the log of the
        # job is open for what its handler says.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        return self.task_function(cfg)

    def checkpoint(self) -> Any:
        """What submitit runs again when Slurm has taken the machine away: the same job, in the same folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


#: What a job prints, in its folder.
OUTPUT = "output.log"


def folder(cfg: DictConfig) -> Path:
    """The folder that the job with this config writes to."""
    return Path(cfg.hydra.sweep.dir) / str(cfg.hydra.sweep.subdir)


def thread_limits(threads: int) -> dict[str, str]:
    """The environment of a process with so many CPU threads; a limit that the user set for every process stays."""
    return {name: os.environ.get(name, str(max(1, threads))) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def perform(pickled: bytes, folder: Path, environment: Mapping[str, str]) -> bytes:
    """Run a pickled :class:`Task` in this process, which must be its own, and pickle how it ended. What it prints goes
    to the job's ``folder``; OMP_NUM_THREADS, its CPU threads, is in the job's ``environment``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / OUTPUT).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch may have been imported before
    task: Task = cloudpickle.loads(pickled)
    returned = task()
    sys.stdout.flush()
    try:
        return cloudpickle.dumps(returned)
    except Exception:  # an exception of the user's own that does not survive the journey
        return cloudpickle.dumps(failed(task, KdqError(describe(returned._return_value))))


def failed(task: Task, error: Exception) -> JobReturn:
    """The return of a job that could not say itself how it ended."""
    returned = JobReturn(overrides=task.overrides, status=JobStatus.FAILED)
    returned.return_value = error
    return returned
