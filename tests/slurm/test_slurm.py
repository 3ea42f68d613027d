"""A real Slurm with two nodes: grids, several tasks, requeues and cancelled jobs.

``.ci/run`` installs it, starts it with ``start.sh`` and sets SLURM_CONF. Every launcher call has a hard time limit, and
trainings are tiny: what takes the time is starting Python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kdq.weights import file_digest

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        "SLURM_CONF" not in os.environ or shutil.which("sbatch") is None,
        reason="no Slurm here: .ci/run installs and starts one (tests/slurm/start.sh)",
    ),
    pytest.mark.timeout(440),
]
CALL = 400
NODES = [
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.mem_gb=1",
    'hydra.launcher.setup=["export MASTER_ADDR=127.0.0.1"]',  # the names of these pretend nodes do not resolve
]
SMALL = [
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "method=baseline",
    "quant=none",
    "student.net.depth=8",
    "student.net.width=0.25",
    "student.recipe.batch_size=32",
    "student.recipe.epochs=2",
    "data.train_limit=128",
]


def start(output: Path, *overrides: str, launcher: Sequence[str] = NODES) -> subprocess.Popen[str]:
    arguments = [*launcher, *SMALL, *overrides, f"paths.output_dir={output}"]
    command = ["timeout", "-k", "5", str(CALL), sys.executable, "-m", "kdq", "-m", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kdq(output: Path, *overrides: str, launcher: Sequence[str] = NODES) -> tuple[int, str]:
    process = start(output, *overrides, launcher=launcher)
    text = process.communicate()[0]
    return process.returncode, text


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.strip()


def wait_for(process: subprocess.Popen[str], what: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def weights(output: Path) -> dict[str, str]:
    return {path.parent.name: file_digest(path) for path in output.glob("store/[!.]*/weights.safetensors")}


@pytest.fixture
def network_folder(tmp_path: Path) -> Iterator[Path]:
    """What both nodes see: the store and the rows of all jobs are in it."""
    yield tmp_path
    for job in slurm("squeue", "-h", "-o", "%A").split():
        slurm("scancel", job)


def test_a_grid_runs_in_named_jobs_and_one_that_is_cancelled_takes_no_other_with_it(network_folder: Path) -> None:
    process = start(network_folder, "student.recipe.epochs=2,3,9000")
    wait_for(process, lambda: len(weights(network_folder)) == 2)
    wait_for(process, lambda: len(slurm("squeue", "-h").splitlines()) == 1)
    ((job, name),) = [line.split() for line in slurm("squeue", "-h", "-o", "%A %j").splitlines()]
    assert name == "digits-baseline-resnet20-s0"
    slurm("scancel", job)
    text = process.communicate()[0]
    assert process.returncode == 1, text
    assert len(list(network_folder.glob("rows/*.json"))) == 2
    assert "kdq: 1 of 3 rows are missing" in text
    failures = [json.loads(path.read_text()) for path in network_folder.glob("failed/*.json")]
    assert sorted(failure["name"] for failure in failures) == [name, f"{name}-none-b32"]
    assert all(f"Slurm job {job} ended as CANCELLED without a result" in failure["cause"] for failure in failures)
    printed = list(network_folder.glob("runs/*/*/slurm/*_log.out"))
    assert len(printed) == 5  # three trainings, two rows
    jobs = ",".join(path.name.split("_")[0] for path in printed)
    assert settled(jobs) == ["CANCELLED"] + ["COMPLETED"] * 4


def settled(jobs: str) -> list[str]:
    """How the jobs ended; accounting hears of it some seconds after the launcher has their results."""
    for _ in range(60):
        lines = slurm("sacct", "-X", "-n", "-o", "State%20", "-j", jobs).splitlines()
        states = sorted(line.split()[0] for line in lines)
        if not {"RUNNING", "COMPLETING", "PENDING"} & set(states):
            break
        time.sleep(1)
    return states


@pytest.mark.parametrize("nodes", [1, 2])
def test_several_tasks_train_what_one_process_does(nodes: int, network_folder: Path) -> None:
    """Two tasks on one node, and two on each of two: the same batches, in parts, up to BatchNorm over each part."""
    code, text = kdq(network_folder, "trainer.strategy=ddp", "trainer.devices=2", f"trainer.num_nodes={nodes}")
    assert code == 0, text
    (row,) = [json.loads(path.read_text()) for path in network_folder.glob("rows/*.json")]
    assert row["train_seconds"] > 0
    printed = list(network_folder.glob("runs/*/*/slurm/*_log.out"))
    assert len(printed) == 2 * nodes + 1  # a file for each task of the training, and one for the row
    assert not list(network_folder.glob("store/.work/*"))
    asked = slurm("sacct", "-X", "-n", "-P", "-o", "NNodes,NCPUS", "-j", printed[0].name.split("_")[0])
    assert asked


def test_a_requeued_training_goes_on_and_ends_with_the_same_weights(network_folder: Path) -> None:
    """USR2 is what Slurm sends before the time is up, and when it preempts."""
    process = start(network_folder, "student.recipe.epochs=150")
    wait_for(process, lambda: list(network_folder.glob("store/.work/*/last.ckpt")))
    job = slurm("squeue", "-h", "-o", "%A")
    slurm("scancel", "--signal=USR2", job)
    wait_for(process, lambda: slurm("squeue", "-h", "-o", "%T") == "PENDING", 60)

    def running() -> bool:  # Slurm lets a requeued job wait for two minutes
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        return slurm("squeue", "-h", "-o", "%T") == "RUNNING"

    wait_for(process, running, 60)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    (log,) = [path for path in network_folder.glob("runs/*/*/*.log") if "going on after epoch" in path.read_text()]
    epoch = int(log.read_text().partition("going on after epoch ")[2].split()[0])
    assert 0 < epoch < 150
    assert log.read_text().count("Requeued job") == 1
    expected, undisturbed = weights(network_folder), network_folder / "undisturbed"
    code, text = kdq(undisturbed, "student.recipe.epochs=150", launcher=())
    assert code == 0, text
    assert weights(undisturbed) == expected
