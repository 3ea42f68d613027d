"""Launching a plan, wave after wave. What is there afterwards decides what was done, not what a launcher says."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdq.records.failures import Failure, forget, read_failures, record
from kdq.records.store import key_of
from kdq.sweep.plan import Job, Plan
from kdq.sweep.status import Status, present
from kdq.utils.messages import describe

#: Runs jobs, given the overrides of each and the number of the first, and says how each ended.
Launch = Callable[[list[list[str]], int], Sequence[Any]]


def run_plan(plan: Plan, launch: Launch, folder: Path, status: Status) -> list[Failure]:
    """Make everything that can be made, each job in a folder of its own below ``folder``; one that fails takes with it
    only those that need what it makes. Returns what was not made, a model before the rows that needed it."""
    forget(plan.output, {_cell_key(cell) for cell in plan.cells})
    for cell, cause in plan.impossible:
        record(plan.output, Failure("cell", _cell_key(cell), cause, "", list(cell)))
    failed: dict[str, Failure] = {}
    number = 0
    for wave in plan.waves:
        ready = [job for job in wave if not job.needs & failed.keys()]
        for job in wave:
            forget(plan.output, job.makes)
            if lost := next((failed[key] for key in failed if key in job.needs), None):
                failed |= _record(plan.output, job, f"needs {lost.name}, which failed: {lost.cause}", lost.log)
        if not ready:
            continue
        folders = [f"{number + index:03d}-{_plain(job.name)}" for index, job in enumerate(ready)]
        overrides = [_overrides(job, own) for job, own in zip(ready, folders, strict=True)]
        with status.wave(ready, [folder / own for own in folders]):
            causes = _launched(launch, overrides, number)
        number += len(ready)
        for job, own, cause in zip(ready, folders, causes, strict=True):
            log = folder / own / f"{_plain(job.name)}.log"  # Hydra's; none of a job that never started
            failed |= _judged(plan.output, job, cause, str(log) if log.is_file() else "")
    return list(failed.values())


def _overrides(job: Job, folder: str) -> list[str]:
    # Names are quoted: a key of digits would be read as a number.
    own = [f"hydra.job.name='{_plain(job.name)}'", f"hydra.sweep.subdir='{folder}'"]
    if job.kind == "rows":
        own += ["trainer.devices=1", "trainer.num_nodes=1"]  # more would be held for nothing
    else:
        (key,) = job.makes
        own.append(f"kdq.train='{key}'")
    return [*job.overrides, *own]


def _cell_key(overrides: Sequence[str]) -> str:
    """Identifies a cell that could not be planned, so that it has no row's key."""
    return key_of({"cell": list(overrides)})


def _plain(name: str) -> str:
    """A name for files and jobs, whatever a data set or a network is called."""
    return re.sub(r"[^\w.-]+", "_", name)


def _launched(launch: Launch, overrides: list[list[str]], number: int) -> list[str]:
    """How each job ended: the cause of its failure, or nothing."""
    try:
        returns = launch(overrides, number)
    except Exception as error:
        # A launcher may give up on all jobs because of one, when others have finished or still run.
        return [describe(error)] * len(overrides)
    values = [getattr(returned, "_return_value", None) for returned in returns]
    return [describe(value) if isinstance(value, BaseException) else "" for value in values]


def _judged(output: Path, job: Job, cause: str, log: str) -> dict[str, Failure]:
    """What of the job's is not there, by key; the job itself has recorded why, or could not."""
    there = present(output, job.makes, job.columns)
    recorded = read_failures(output)
    failed = {key: failure for key, failure in recorded.items() if key in job.makes and key not in there}
    silent = [key for key in job.makes if key not in there and key not in failed]
    if silent:
        failed |= _record(output, job, cause or "the job ended without a result", log, silent)
    return failed


def _record(output: Path, job: Job, cause: str, log: str, keys: Sequence[str] | None = None) -> dict[str, Failure]:
    failures = {key: Failure(job.makes[key], key, cause, log, list(job.overrides)) for key in (keys or job.makes)}
    for failure in failures.values():
        record(output, failure)
    return failures
