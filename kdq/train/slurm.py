"""kdq as several tasks of one Slurm step, which is how a training gets several nodes: task 0 does everything, and the
others only train.

    task 0                                          tasks 1..n-1
    runs the command                                wait for orders
    for each training: publishes an order, and      start a process of the training with Slurm's rank,
    starts its own process like the others          report how it ended
    ends                                            end, also when task 0 was killed: its connection breaks

No task but the first looks into the store or decides what is done. Orders travel through a TCPStore of task 0; the
processes of a training find each other through Lightning's SLURMEnvironment. Its requeueing is off: submitit owns it.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdq.utils.errors import KdqError

if TYPE_CHECKING:  # torch is slow to import, and most commands have one task
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from torch.distributed import TCPStore

#: Seconds for all tasks of a step to start.
START = timedelta(seconds=600)
#: Seconds that a worker has to end.
PATIENCE = 15.0
#: Seconds between two looks.
LOOK = 0.2

_orders: TCPStore | None = None
_number = 0


def tasks() -> int:
    """How many tasks this step of Slurm has; 1 outside of Slurm."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def environment() -> ClusterEnvironment:
    """Where Lightning takes ranks and addresses from."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

    return SLURMEnvironment(auto_requeue=False) if tasks() > 1 else LightningEnvironment()


@contextmanager
def leading() -> Iterator[bool]:
    """Lead the other tasks of the step while the block runs (yields True), or follow until task 0 ends, and yield
    False: then there is nothing to do. Outside of Slurm, and inside another such block, it only yields True."""
    global _orders
    if tasks() == 1 or _orders is not None:
        yield True
    elif int(os.environ["SLURM_PROCID"]) > 0:
        _follow()
        yield False
    else:
        from torch.distributed import DistError, TCPStore

        _orders = TCPStore(*_place(), None, True, START, wait_for_workers=False)
        try:
            yield True
        finally:
            _orders.set(f"order-{_number}", "end")
            with suppress(DistError):  # a task that was killed says nothing
                _orders.wait([f"ended-{rank}" for rank in range(1, tasks())], timedelta(seconds=10))
            _orders = None


def check(processes: int) -> None:
    """See to it that Slurm started as many tasks as a training has processes."""
    if tasks() != processes:
        raise KdqError(
            f"trainer.devices x trainer.num_nodes is {processes}, but this is one of {tasks()} tasks: let Slurm start "
            "one for each device (hydra/launcher=slurm does, or srun --nodes=... --ntasks-per-node=...)"
        )


def run(module: str, job: Path) -> list[int]:
    """Run ``python -m module job`` as one process in each task; returns their exit codes, all 0 if it went well."""
    global _number
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    assert _orders is not None, "several tasks of Slurm train inside of leading()"
    order, number = {"module": module, "job": str(job), "port": find_free_network_port()}, _number
    _number += 1
    _orders.set(f"order-{number}", json.dumps(order))
    names = [f"code-{number}-{rank}" for rank in range(1, tasks())]
    worker = _start(order)
    try:
        while worker.poll() is None:
            codes = [int(_orders.get(name)) for name in names if _orders.check([name])]
            if any(codes):
                break  # the others would wait for it for ever
            time.sleep(LOOK)
        else:
            codes = []
        if worker.poll() == 0 and not any(codes):
            _reported(names)
    finally:
        _orders.set(f"stop-{number}", "")
        worker.terminate()
        own = ended(worker)
    return [own, *(int(_orders.get(name)) for name in names if _orders.check([name]))]


def _reported(names: list[str]) -> None:
    from torch.distributed import DistError

    assert _orders is not None
    try:
        _orders.wait(names, timedelta(seconds=60))
    except DistError as error:
        raise KdqError("a task of this Slurm step did not say how its part of the training ended; try again") from error


def ended(worker: subprocess.Popen[bytes]) -> int:
    """The exit code of a worker that was told to end: one that waits for a peer that died may not hear it."""
    try:
        return worker.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        worker.kill()
        return worker.wait()


def _follow() -> None:
    from torch.distributed import DistError, TCPStore

    rank = int(os.environ["SLURM_PROCID"])
    try:
        store = TCPStore(*_place(), None, False, START, wait_for_workers=False)
        for number in itertools.count():
            while not store.check([f"order-{number}"]):
                time.sleep(LOOK)
            text = store.get(f"order-{number}").decode()
            if text == "end":
                store.set(f"ended-{rank}", "")
                return
            worker = _start(json.loads(text))
            try:
                while worker.poll() is None and not store.check([f"stop-{number}"]):
                    time.sleep(LOOK)
            finally:
                worker.terminate()
                code = ended(worker)
            store.set(f"code-{number}-{rank}", str(code))
    except DistError as error:
        raise KdqError(f"task 0 of this Slurm step ended: {str(error).splitlines()[0]}") from error


def _start(order: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """This task's process of a training. It ends with this one: see :mod:`kdq.train.processes`."""
    address, _ = _place()
    own = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(order["port"]),
        "WORLD_SIZE": str(tasks()),
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1")),
    }
    return start_worker(order["module"], order["job"], own)


def start_worker(module: str, job: str | Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start ``python -m module job`` with ``environment`` beside this process's own.

    Slurm's warning goes to every process of a step. It is this one that heeds it: the worker holds it back for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])  # a new process has its parent's mask
    try:
        command = [sys.executable, "-m", module, str(job)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _place() -> tuple[str, int]:
    """Where task 0 listens: MASTER_ADDR and MASTER_PORT where they are set, else Slurm's first node and a port from
    the job's number, which all tasks know."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    return slurm.main_address, slurm.main_port
