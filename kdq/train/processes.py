"""A training on several devices: one fresh process for each, and a parent that waits. (Over several nodes the tasks of
:mod:`kdq.train.slurm` are the parents.)

Lightning's own launchers repeat the command line, which in a sweep is the whole sweep, or fork this process, which
may have started a device. Here each process gets the job as a file and does nothing but train:

    parent (holds the store's lock)          worker 0..n-1: python -m kdq.train.processes JOB.json
    writes work/job.json, starts n workers   read it, train under DDP
    waits; one dead worker ends all          worker 0 logs, checkpoints, writes work/result/
    reads work/result/

A worker ends when its parent does, however the parent ends: it watches a pipe that only the parent holds open.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from kdq.stages.cell import Cell
from kdq.stages.training import TrainingSpec, train
from kdq.train import slurm as cluster
from kdq.train.fit import Best
from kdq.train.trainer import ALL_DEVICES
from kdq.utils.cpu import keep_freed_memory, usable_cores
from kdq.utils.errors import KdqError


@contextmanager
def run_training(cell: Cell, spec: TrainingSpec, work: Path) -> Iterator[tuple[dict[str, Best], dict[str, Any]]]:
    """Run ``spec`` in this process, or in one process for each of ``trainer.devices`` when there are several.

    Raises:
        KdqError: the training failed, or something else has already started several processes of kdq.
    """
    config = cell.cfg.trainer
    processes = count_devices(config.devices, config.accelerator) * config.num_nodes
    if cluster.tasks() > 1 or config.num_nodes > 1:
        cluster.check(processes)
    if processes == 1:
        with train(cell, spec, work) as result:
            yield result
        return
    refuse_torchrun()
    batch, accumulate = spec.recipe["batch_size"], spec.recipe["accumulate"]
    if batch % (processes * accumulate):
        raise KdqError(f"recipe.batch_size={batch} must be a multiple of {processes} devices x {accumulate} portions")
    job = {"cfg": OmegaConf.to_container(cell.cfg, resolve=True), "spec": asdict(spec), "work": str(work.absolute())}
    (work / "job.json").write_text(json.dumps(job))
    shutil.rmtree(work / "result", ignore_errors=True)
    for old in work.glob("error-*.txt"):
        old.unlink()
    codes = cluster.run(work / "job.json") if cluster.tasks() > 1 else _run_workers(work, processes)
    # A worker whose peer died fails, too; the one with a message for people is the cause.
    messages = [file.read_text() for file in sorted(work.glob("error-*.txt"))]
    if messages:
        raise KdqError(messages[0])
    if any(codes):
        raise KdqError(f"a process of the training died (exit codes {codes}): its error is above")
    yield _read_result(work / "result")


def count_devices(devices: Any, accelerator: str) -> int:
    """How many devices ``trainer.devices`` means: a number, or -1 / ``auto`` for all there are.

    Raises:
        KdqError: it is neither, or that many do not exist.
    """
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
    """Several processes of torchrun would each start their own processes.

    Raises:
        KdqError: this process is one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KdqError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but kdq starts those of a training itself: "
            "run kdq without torchrun, with trainer.devices=N"
        )


def _run_workers(work: Path, processes: int) -> list[int]:
    """Start the workers on this machine and wait for all of them; returns their exit codes."""
    threads = max(1, usable_cores() // processes)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    command = [sys.executable, "-m", "kdq.train.processes", str(work / "job.json")]
    workers = []
    try:
        for rank in range(processes):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment))
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break  # the others would wait for it for ever
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.terminate()
        codes = [cluster.ended(worker) for worker in workers]
    return codes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_result(folder: Path, best: dict[str, Best], metrics: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for name, one in best.items():
        save_file({key: tensor.contiguous() for key, tensor in one.weights.items()}, folder / f"{name}.safetensors")
    scores = {name: [one.top1, one.epoch] for name, one in best.items()}
    (folder / "result.json").write_text(json.dumps({"best": scores, "metrics": metrics}))


def _read_result(folder: Path) -> tuple[dict[str, Best], dict[str, Any]]:
    result = json.loads((folder / "result.json").read_text())
    best = {
        name: Best(top1, epoch, load_file(folder / f"{name}.safetensors"))
        for name, (top1, epoch) in result["best"].items()
    }
    return best, result["metrics"]


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent dies; sys.stdin would be locked at this process's own end
    os._exit(1)


def _worker(job_file: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's warning goes to every process; the parent heeds it
    keep_freed_memory()
    job, rank, world_size = json.loads(job_file.read_text()), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cell, spec, work = Cell(OmegaConf.create(job["cfg"])), TrainingSpec.from_json(job["spec"]), Path(job["work"])
    try:
        with train(cell, spec, work, rank, world_size) as (best, metrics):
            if rank == 0:
                _write_result(work / "result", best, metrics)
    except KdqError as error:
        (work / f"error-{rank}.txt").write_text(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
