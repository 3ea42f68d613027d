"""How a machine is divided, and processes that leave nothing behind and die alone."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from kdq.sweep.local import Share, launch, shares, usable_gpus
from kdq.utils.errors import KdqError
from tests.conftest import TINY


def test_without_gpus_cores_are_divided() -> None:
    assert shares([], 8, None, 1, 1) == [Share((), 1)] * 8
    assert shares([], 8, 3, 1, 1) == [Share((), 2)] * 3
    assert shares([], 2, 4, 1, 1) == [Share((), 1)] * 4
    assert shares([], 8, None, 1, 2) == [Share((), 1)] * 4  # two processes each
    for jobs, devices in [(None, 1), (1, 1), (2, 2), (3, 1), (1, 8)]:
        machine = shares([], 8, jobs, 1, devices)
        assert sum(share.threads * devices for share in machine) <= 8


def test_with_gpus_every_job_has_its_own_unless_they_are_to_be_shared() -> None:
    gpus = ["0", "1", "2", "3"]
    assert [share.gpus for share in shares(gpus, 16, None, 1, 1)] == [("0",), ("1",), ("2",), ("3",)]
    assert [share.threads for share in shares(gpus, 16, None, 1, 1)] == [4] * 4
    shared = shares(gpus[:2], 16, None, 3, 1)
    assert [share.gpus for share in shared] == [("0",), ("1",)] * 3
    assert sum(share.threads for share in shared) <= 16
    assert [share.gpus for share in shares(gpus, 16, None, 1, 2)] == [("0", "1"), ("2", "3")]
    assert [share.gpus for share in shares(gpus, 16, None, 1, 3)] == [("0", "1", "2")]
    assert [share.gpus for share in shares(gpus, 16, 3, 1, 1)] == [("0",), ("1",), ("2",)]
    with pytest.raises(KdqError, match=r"trainer\.devices=5, but 4 GPUs"):
        shares(gpus, 16, None, 1, 5)


@pytest.mark.parametrize(("jobs", "per_gpu"), [(0, 1), (-1, 1), (None, 0)])
def test_impossible_numbers_are_refused(jobs: int | None, per_gpu: int) -> None:
    with pytest.raises(KdqError, match="must be a number of at least 1"):
        launch([], jobs, per_gpu)


def test_the_environment_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert Share(("2", "3"), 4).environment() == {
        "OMP_NUM_THREADS": "4",
        "MKL_NUM_THREADS": "4",
        "CUDA_VISIBLE_DEVICES": "2,3",
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Share((), 4).environment() == {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "4"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert usable_gpus() == ["5", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usable_gpus() == []


@dataclass
class Visitor:
    """Stands in for a job: notes which GPU it sees, waits until ``together`` jobs are there, and leaves."""

    folder: Path
    number: int
    together: int
    overrides: list[str] = field(default_factory=list)

    def job_config(self) -> DictConfig:
        sweep = {"dir": str(self.folder / "jobs"), "subdir": str(self.number)}
        return OmegaConf.create({"trainer": {"accelerator": "auto", "devices": 1}, "hydra": {"sweep": sweep}})

    def __call__(self) -> JobReturn:
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        with (self.folder / "log").open("a") as log:
            print("in", gpu, file=log, flush=True)
            end = time.monotonic() + 100
            while (self.folder / "log").read_text().count("in") < self.together and time.monotonic() < end:
                time.sleep(0.02)
            print("out", gpu, file=log, flush=True)
        return JobReturn(overrides=self.overrides, status=JobStatus.COMPLETED)


@pytest.mark.parametrize("jobs_per_gpu", [1, 2])
def test_gpus_are_shared_as_asked_and_never_more(
    jobs_per_gpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs that only CUDA_VISIBLE_DEVICES knows: real processes, which wait until all slots are taken at once."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    slots = 2 * jobs_per_gpu
    returned = launch([Visitor(tmp_path, number, slots) for number in range(2 * slots)], None, jobs_per_gpu)
    assert [one.status for one in returned] == [JobStatus.COMPLETED] * len(returned)
    inside, most = Counter[str](), Counter[str]()
    for what, gpu in (line.split() for line in (tmp_path / "log").read_text().splitlines()):
        inside[gpu] += 1 if what == "in" else -1
        most[gpu] = max(most[gpu], inside[gpu])
    assert most == {"3": jobs_per_gpu, "5": jobs_per_gpu}


@pytest.mark.timeout(280)
def test_jobs_are_fresh_processes_and_one_that_is_killed_dies_alone(tmp_path: Path) -> None:
    (tmp_path / "lethal_net.py").write_text(
        "import multiprocessing, os, signal\n"
        "from kdq.models import CifarResNet\n"
        "def net(lethal=False, **options):\n"
        "    if lethal and multiprocessing.parent_process() is not None:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return CifarResNet(**options)\n"
    )
    command = [sys.executable, "-m", "kdq"]  # which builds the network, too: to see what it costs
    arguments = ["-m", "method=baseline", "student.net._target_=lethal_net.net", "+student.net.lethal=true,false"]
    arguments += [
        "quant.bits=2",
        "hydra/launcher=local",
        "hydra.launcher.jobs=2",
        *TINY,
        f"paths.output_dir={tmp_path}",
    ]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=270,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"kdq: failed: digits-baseline-resnet20-s0 \+student.net.lethal=true", done.stderr, re.IGNORECASE)
    assert "was killed by signal 9" in done.stderr
    assert "kdq: 1 of 2 rows are missing" in done.stderr
    assert len(list((tmp_path / "rows").glob("*.json"))) == 1
    assert len(list(tmp_path.glob("runs/*/*/output.log"))) == 3  # two trainings, one job of rows
