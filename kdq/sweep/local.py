"""Jobs of a sweep as processes of this machine: fresh ones, some at once, each with its share of it."""

import os
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import cloudpickle
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

from kdq.sweep.task import OUTPUT, Task, failed, folder, perform, thread_limits
from kdq.utils.checks import within
from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError
from kdq.utils.signals import kill_children


def launch(tasks: Sequence[Task], jobs: int | None, jobs_per_gpu: int) -> list[JobReturn]:
    """Run every job in a fresh process, so that nothing of it is left for the next, and one that dies dies alone.

    The processes are forked from a server that has imported kdq and done nothing else: they start at once. What a job
    prints goes to ``output.log`` in its folder.

    Args:
        jobs: at most so many at once; None: one for each GPU, or for each core where there is none.
        jobs_per_gpu: so many jobs share one GPU.
    """
    for name, value in (("jobs", jobs), ("jobs_per_gpu", jobs_per_gpu)):
        if value is not None:
            within(f"hydra.launcher.{name}", value, 1)
    configs = [task.job_config() for task in tasks]
    gpus = usable_gpus() if any(cfg.trainer.accelerator != "cpu" for cfg in configs) else []
    devices = max(_devices(cfg.trainer.devices, len(gpus)) for cfg in configs)
    machine = shares(gpus, usable_cores(), jobs, jobs_per_gpu, devices)
    free: queue.SimpleQueue[Share] = queue.SimpleQueue()
    for share in machine:
        free.put(share)
    context = get_context("forkserver")
    context.set_forkserver_preload(["kdq.cli.app", "kdq.stages.pipeline"])

    def run(task: Task, cfg: DictConfig) -> JobReturn:
        share = free.get()
        try:
            return _run(context, task, share, folder(cfg))
        finally:
            free.put(share)

    pool = ThreadPoolExecutor(len(machine))
    try:
        return list(pool.map(run, tasks, configs))
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        kill_children()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Share:
    """What one of the jobs that run at once may use: GPUs by number (none: no GPU), and CPU threads."""

    gpus: tuple[str, ...]
    threads: int

    def environment(self) -> dict[str, str]:
        return thread_limits(self.threads) | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def shares(gpus: Sequence[str], cpus: int, jobs: int | None, jobs_per_gpu: int, devices: int) -> list[Share]:
    """How the machine is divided among the jobs that run at once: at most ``jobs``, each with ``devices`` of its
    ``gpus``, which ``jobs_per_gpu`` share, or with as many of its ``cpus`` where there is no GPU."""
    if gpus and devices > len(gpus):
        raise KdqError(f"trainer.devices={devices}, but {len(gpus)} GPUs can be used here")
    groups = [tuple(gpus[start : start + devices]) for start in range(0, len(gpus) - devices + 1, devices)]
    slots = groups * jobs_per_gpu or [()] * max(1, jobs or cpus // devices)
    slots = slots[: jobs or len(slots)]
    return [Share(group, max(1, cpus // len(slots) // (1 if group else devices))) for group in slots]


def usable_gpus() -> list[str]:
    """The GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    return [str(number) for number in range(torch.cuda.device_count())]


def _devices(asked: Any, gpus: int) -> int:
    """GPUs, or processes on CPUs, of a job with ``trainer.devices=asked``."""
    from kdq.train.trainer import ALL_DEVICES

    if asked in ALL_DEVICES:
        return max(1, gpus)
    if not isinstance(asked, int) or asked < 1:
        raise KdqError(f"hydra/launcher=local chooses the GPUs itself: give trainer.devices a number, not {asked}")
    return asked


def _run(context: ForkServerContext, task: Task, share: Share, own: Path) -> JobReturn:
    """Run one job and wait for it."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_job, args=(theirs, cloudpickle.dumps(task), own, share), daemon=True)
    process.start()
    theirs.close()
    returned = None
    with suppress(EOFError):  # it died
        returned = cloudpickle.loads(ours.recv_bytes())
    process.join()
    if returned is None:
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        returned = failed(task, KdqError(f"the process of the job {how}; see {own / OUTPUT}"))
    return returned


def _job(pipe: Connection, pickled: bytes, own: Path, share: Share) -> None:
    """The process of a job."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send_bytes(perform(pickled, own, share.environment()))


def _end_with_parent() -> None:
    """However the command ends, no job of it goes on."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
