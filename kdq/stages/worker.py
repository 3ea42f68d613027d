"""A training in this process, or in one process for each device: what the processes of :mod:`kdq.train.processes` do.

parent (holds the store's lock)          worker 0..n-1: python -m kdq.stages.worker JOB.json
writes work/job.json, starts n workers   read it, train under DDP
waits                                    worker 0 logs, checkpoints, writes work/result.pt
reads work/result.pt
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kdq.stages.cell import Cell
from kdq.stages.training import TrainingSpec, train
from kdq.train import processes
from kdq.train import slurm as cluster
from kdq.train.fit import Best
from kdq.utils.cpu import keep_freed_memory
from kdq.utils.errors import KdqError, StoppedTrialError
from kdq.utils.files import write_text


@contextmanager
def run_training(cell: Cell, spec: TrainingSpec, work: Path) -> Iterator[tuple[dict[str, Best], dict[str, Any]]]:
    """Run ``spec`` in this process, or in one process for each of ``trainer.devices`` when there are several."""
    config = cell.cfg.trainer
    count = processes.count_devices(config.devices, config.accelerator) * config.num_nodes
    if cluster.tasks() > 1 or config.num_nodes > 1:
        cluster.check(count)
    if count == 1:
        with train(cell, spec, work) as result:
            yield result
        return
    processes.refuse_torchrun()
    batch, accumulate = spec.recipe["batch_size"], spec.recipe["accumulate"]
    if batch % (count * accumulate):
        raise KdqError(f"recipe.batch_size={batch} must be a multiple of {count} devices x {accumulate} portions")
    job = {"cfg": OmegaConf.to_container(cell.cfg, resolve=True), "spec": asdict(spec), "work": str(work.absolute())}
    (work / "job.json").write_text(json.dumps(job))
    for old in (work / "result.pt", *work.glob("error-*.json")):
        old.unlink(missing_ok=True)
    codes = processes.run("kdq.stages.worker", work / "job.json", count)
    # A worker whose peer died fails, too; the one with a message for people is the cause.
    if errors := sorted(work.glob("error-*.json")):
        message, stopped_at = json.loads(errors[0].read_text())
        raise KdqError(message) if stopped_at is None else StoppedTrialError(message, stopped_at)
    if any(codes):
        raise KdqError(f"a process of the training died (exit codes {codes}): its error is above")
    result = torch.load(work / "result.pt", map_location="cpu", weights_only=True)
    yield {name: Best(**best) for name, best in result["best"].items()}, result["metrics"]


def _worker(job_file: Path) -> None:
    processes.follow_parent()
    keep_freed_memory()
    job, rank, world_size = json.loads(job_file.read_text()), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cell, spec, work = Cell(OmegaConf.create(job["cfg"]), True), TrainingSpec.from_json(job["spec"]), Path(job["work"])
    try:
        with train(cell, spec, work, rank, world_size) as (best, metrics):
            if rank == 0:
                result = {"best": {name: vars(learner) for name, learner in best.items()}, "metrics": metrics}
                torch.save(result, work / "result.pt")
    except KdqError as error:
        stopped_at = error.value if isinstance(error, StoppedTrialError) else None
        write_text(work / f"error-{rank}.json", json.dumps([str(error), stopped_at]))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
