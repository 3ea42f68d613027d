"""Jobs of a sweep as Ray tasks, of a cluster or of this machine."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from kdq.sweep.task import Task, failed, folder, perform, thread_limits
from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError, message
from kdq.utils.messages import describe

#: Bytes that a Ray of our own keeps for objects: what jobs return is small.
OBJECTS = 100_000_000


def launch(tasks: Sequence[Task], address: str | None, num_cpus: float, num_gpus: float) -> list[JobReturn]:
    """Run every job as one Ray task in a process of its own, with the resources of its own config, and wait for all.
    One that dies takes no other with it, and is not tried again.

    Args:
        address: of a running cluster, whose nodes share the folder that this command runs in; None: a Ray on this
            machine, which ends with the jobs.
        num_cpus: for each device of a job.
        num_gpus: for each device of a job, where the cluster has GPUs; 0.5: two jobs share one.
    """
    try:
        import ray
    except ImportError as error:
        raise KdqError("hydra/launcher=ray needs Ray: pip install 'kdq[ray]'") from error

    configs = [task.job_config() for task in tasks]
    for cfg in configs:
        if not isinstance(cfg.trainer.devices, int) or cfg.trainer.devices < 1:
            raise KdqError(f"hydra/launcher=ray: give trainer.devices a number, not {cfg.trainer.devices}")
    with _connected(ray, address):
        present = ray.cluster_resources()
        asked = [_resources(cfg, num_cpus, num_gpus if present.get("GPU") else 0) for cfg in configs]
        if address is None:  # a cluster may grow
            _check(present, asked)
        # A worker is used once, so that nothing of a job is left for the next.
        job = ray.remote(max_calls=1, max_retries=0)(_job)
        results = [
            job.options(name=cfg.hydra.job.name, **own).remote(
                cloudpickle.dumps(task), os.getcwd(), folder(cfg), thread_limits(int(num_cpus))
            )
            for task, cfg, own in zip(tasks, configs, asked, strict=True)
        ]
        return [_returned(ray, task, result) for task, result in zip(tasks, results, strict=True)]


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Ray would report its use to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
        own["object_store_memory"] = OBJECTS
    else:
        own = {"address": address}
    try:
        ray.init(**own, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise KdqError(f"hydra.launcher.address={address}: {message(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _resources(cfg: DictConfig, num_cpus: float, num_gpus: float) -> dict[str, float]:
    """What a job with this config asks Ray for."""
    devices = cfg.trainer.devices
    return {"num_cpus": num_cpus * devices, "num_gpus": 0 if cfg.trainer.accelerator == "cpu" else num_gpus * devices}


def _check(present: dict[str, float], asked: Sequence[dict[str, float]]) -> None:
    """Refuse what is not there, for which Ray would wait for ever."""
    for name, kind in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        most = max(own[name] for own in asked)
        if most > present.get(kind, 0):
            raise KdqError(
                f"a job asks Ray for {most:g} {kind}s and there are {present.get(kind, 0):g}: lower trainer.devices or "
                f"hydra.launcher.{name}"
            )


def _job(pickled: bytes, shared: str, own: Path, environment: dict[str, str]) -> bytes:
    """The task, in a worker of Ray, which starts somewhere else."""
    try:
        os.chdir(shared)
    except OSError as error:
        raise KdqError(f"the nodes of a Ray cluster must share the folder {shared}: {error.strerror}") from error
    return perform(pickled, own, environment)


def _returned(ray: Any, task: Task, result: Any) -> JobReturn:
    try:
        return cloudpickle.loads(ray.get(result))
    except ray.exceptions.RayTaskError as error:  # raised outside of the job
        return failed(task, KdqError(describe(error.cause)))
    except ray.exceptions.RayError as error:
        return failed(task, KdqError(f"the job's Ray worker died: {message(error)}"))
