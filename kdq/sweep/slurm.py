"""Jobs of a sweep as Slurm jobs, through submitit."""

import logging
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from kdq.sweep.task import Task, failed, folder
from kdq.utils.errors import KdqError
from kdq.utils.messages import describe

log = logging.getLogger(__name__)

#: Seconds between two looks for results, and between two questions to Slurm's accounting.
LOOK, ASK = 1.0, 15.0
#: Starts Python with Slurm's warning held back. Without a handler it ends a process, and the imports of a job take many
#: seconds before submitit has one; :class:`kdq.sweep.task.Task` lets it through.
HELD = (
    "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def launch(tasks: Sequence[Task]) -> list[JobReturn]:
    """Submit every job by itself, with the resources of its own config and a name that says the cell, and wait for all.
    One that is cancelled or dies takes no other with it.

    Before a job's time is up, or when it is preempted, Slurm sends USR2; submitit, the one owner of the requeue, then
    puts the job back into the queue, and it goes on from its last epoch.
    """
    jobs: dict[int, Any] = {}  # by number of the task
    refused: dict[int, JobReturn] = {}
    try:
        for number, task in enumerate(tasks):
            try:
                jobs[number] = _submit(task)
            except Exception as error:  # a limit of the queue, say: those that were submitted go on
                refused[number] = failed(task, KdqError(describe(error)))
        _wait(list(jobs.values()))
    except KeyboardInterrupt:
        left = " ".join(job.job_id for job in jobs.values() if not job.done())
        log.warning("the Slurm jobs go on and the same command finds what they make; to end them: scancel %s", left)
        raise
    return [refused.get(n) or _returned(task, jobs[n]) for n, task in enumerate(tasks)]


def _submit(task: Task) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise KdqError("hydra/launcher=slurm needs submitit: pip install 'kdq[slurm]'") from error

    cfg = task.job_config()
    params: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    del params["_target_"]
    if not isinstance(params["tasks_per_node"], int) or params["tasks_per_node"] < 1:
        raise KdqError(
            f"hydra/launcher=slurm starts a task for each device: give trainer.devices a number, not "
            f"{params['tasks_per_node']}"
        )
    executor = submitit.AutoExecutor(
        folder=folder(cfg) / "slurm",  # what the job prints lies beside its log
        cluster="slurm",
        slurm_max_num_timeout=params.pop("max_num_timeout"),
        slurm_python=shlex.join([sys.executable, "-c", HELD]),
    )
    general = {"name", "timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb"}
    asked = {name: value for name, value in params.items() if value is not None}
    executor.update_parameters(**{k if k in general else f"slurm_{k}": value for k, value in asked.items()})
    return executor.submit(task)


def _wait(jobs: Sequence[Any]) -> None:
    """Wait until all have ended. Results are files; only for jobs that leave none Slurm must be asked."""
    asked = time.monotonic()
    while not all(job.done() for job in jobs):
        time.sleep(LOOK)
        if time.monotonic() - asked > ASK:
            jobs[0].watcher.update()
            asked = time.monotonic()


def _returned(task: Task, job: Any) -> JobReturn:
    try:
        return job.results()[0]
    except Exception as error:
        state = job.state.split()[0]  # "CANCELLED by 0"
        end = KdqError(f"Slurm job {job.job_id} ended as {state} without a result; see {job.paths.stderr}")
        end.__cause__ = error
        return failed(task, end)
