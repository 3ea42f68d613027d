"""A real Slurm with two nodes: grids, several tasks, requeues and cancelled jobs.

``.ci/run`` installs it, starts it with ``start.sh`` and sets SLURM_CONF. Every launcher call has a hard time limit, and
trainings are tiny: what takes the time is starting Python.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kdq.utils.files import file_digest

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


#: A network whose training takes as long as a file says, wherever it runs.
PACED_NET = """
import time
from pathlib import Path
from kdq.models import CifarResNet

class Paced(CifarResNet):
    def forward(self, images):
        if self.training:
            time.sleep(float(Path(__file__).with_name("pause").read_text()))
        return super().forward(images)
"""
PACED = ["student.net._target_=paced_net.Paced", "student.recipe.epochs=100"]  # of three steps each


@pytest.fixture
def pause(network_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the seconds that each step of a paced training takes at least."""
    (network_folder / "paced_net.py").write_text(PACED_NET)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(network_folder), *filter(None, sys.path)]))
    return network_folder / "pause"


def resumed(output: Path) -> list[int]:
    """The epochs after which a training was gone on with."""
    text = "".join(path.read_text() for path in output.glob("runs/*/*/*.log"))
    return [int(epoch) for epoch in re.findall(r"going on after epoch (\d+) of", text)]


def start_again(process: subprocess.Popen[str], job: str) -> None:
    """Wait until the requeued job runs again; Slurm would let it wait for two minutes."""

    def running() -> bool:
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
        return slurm("squeue", "-h", "-j", job, "-o", "%T") == "RUNNING"

    wait_for(process, running, 90)


def as_undisturbed(output: Path) -> bool:
    code, text = kdq(output / "undisturbed", *PACED, launcher=())
    assert code == 0, text
    return weights(output / "undisturbed") == weights(output)


def test_a_training_that_is_preempted_and_then_requeued_ends_with_the_same_weights(
    network_folder: Path, pause: Path
) -> None:
    pause.write_text("0.2")
    process = start(network_folder, *PACED, "hydra.launcher.partition=low")
    wait_for(process, lambda: list(network_folder.glob("store/.work/*/last.ckpt")))
    job = slurm("squeue", "-h", "-o", "%A")

    # Another partition takes both nodes: Slurm sends USR2, and submitit requeues the job. Python heeds signals between
    # two operations; where one takes longer than the grace of start.sh, Slurm kills and requeues the job itself, and
    # the training goes on like after any kill, without a word in its log.
    slurm("sbatch", "--partition=main", "--nodes=2", "--exclusive", f"--output={os.devnull}", "--wrap=sleep 1")
    wait_for(process, lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") == "PENDING", 150)
    start_again(process, job)
    wait_for(process, lambda: len(resumed(network_folder)) == 1, 90)
    (checkpoint,) = network_folder.glob("store/.work/*/last.ckpt")
    before = checkpoint.stat().st_mtime_ns
    wait_for(process, lambda: checkpoint.stat().st_mtime_ns > before, 90)

    # What an administrator does, and Slurm when a node dies: no warning.
    slurm("scontrol", "requeue", job)
    pause.write_text("0")
    start_again(process, job)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    first, second = resumed(network_folder)
    assert 0 < first < second < 100
    (log,) = network_folder.glob("runs/*/*/digits-baseline-resnet20-s0.log")
    assert log.read_text().count("this job is preempted") == 1
    assert as_undisturbed(network_folder)


def test_a_training_whose_time_is_up_goes_on_and_ends_with_the_same_weights(network_folder: Path, pause: Path) -> None:
    """Slurm's shortest limit is a minute, and it looks twice a minute: USR2 comes 25 to 55 seconds after the start."""
    pause.write_text("0.25")
    process = start(network_folder, *PACED, "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=5")
    wait_for(process, lambda: list(network_folder.glob("store/.work/*/last.ckpt")))
    job = slurm("squeue", "-h", "-o", "%A")
    wait_for(process, lambda: slurm("squeue", "-h", "-j", job, "-o", "%T") == "PENDING", 120)
    pause.write_text("0")
    start_again(process, job)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert 0 < resumed(network_folder)[0] < 100
    (log,) = network_folder.glob("runs/*/*/digits-baseline-resnet20-s0.log")
    assert "this job is timed-out" in log.read_text()
    assert as_undisturbed(network_folder)
