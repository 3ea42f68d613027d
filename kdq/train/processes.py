"""A training's processes: one fresh process for each device, and a parent that waits. (Over several nodes the tasks of
:mod:`kdq.train.slurm` are the parents.)

Lightning's own launchers repeat the command line, which in a sweep is the whole sweep, or fork this process, which
may have started a device. torch.distributed's elastic launch leaves workers behind when the parent is killed. Here each
process gets a file and does what the module that reads it says:

    parent                                   worker 0..n-1: python -m MODULE JOB
    starts n workers, and waits;             calls follow_parent(), reads the file, works
    one dead worker ends all                 ends when its parent does, however the parent ends: it watches a pipe that
                                             only the parent holds open
"""

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from kdq.train import slurm as cluster
from kdq.train.trainer import ALL_DEVICES
from kdq.utils.cpu import usable_cores
from kdq.utils.errors import KdqError


def run(module: str, job: Path, processes: int) -> list[int]:
    """Run ``python -m module job`` in so many processes, each with its rank in the environment, and wait for all of
    them: on this machine, or one in each task of this step of Slurm when it has several.

    Returns:
        Their exit codes: all 0, or those of processes that died, or were ended because another one had.
    """
    if cluster.tasks() > 1:
        return cluster.run(module, job)
    threads = max(1, usable_cores() // processes)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(cluster.start_worker(module, job, shared | ranks))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break  # the others would wait for it for ever
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.terminate()
        codes = [cluster.ended(worker) for worker in workers]
    return codes


def follow_parent() -> None:
    """End this process, a worker, when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent dies; sys.stdin would be locked at this process's own end
    os._exit(1)


def count_devices(devices: Any, accelerator: str) -> int:
    """How many devices ``trainer.devices`` means: a number, or -1 / ``auto`` for all there are."""
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    present = torch.cuda.device_count()
    if devices in ALL_DEVICES:
        return 1 if on_cpu else present
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise KdqError(
            f"trainer.devices={devices} must be a number from 1 up, or auto; which GPUs, CUDA_VISIBLE_DEVICES says"
        )
    if not on_cpu and devices > present:
        raise KdqError(f"trainer.devices={devices}: this machine has {present} GPUs")
    return devices


def refuse_torchrun() -> None:
    """Several processes of torchrun would each start their own processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KdqError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but kdq starts those of a training itself: "
            "run kdq without torchrun, with trainer.devices=N"
        )
