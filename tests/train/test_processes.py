"""Two processes (gloo, CPU) against one: the same training, one entry, one run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdq.records.store import Entry
from kdq.stages.cell import Cell
from kdq.stages.train import float_model, obtain, planned
from kdq.stages.tune import tuned_models
from kdq.train.processes import count_devices, refuse_torchrun
from kdq.train.slurm import ended
from kdq.utils.config import compose
from kdq.utils.errors import KdqError
from tests.offline_runs import offline_runs

HERE = Path(__file__).parent
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
SMALL = [
    "data.train_limit=96",
    "teacher.net.depth=8",
    "teacher.net.width=0.25",
    "teacher.recipe.epochs=1",
    "student.recipe.epochs=2",
    "student.recipe.batch_size=32",
    "student.recipe.lr=0.05",
    "trainer.precision=32-true",
]
CLIPPED = ["student.recipe.clip_grad=0.5", "student.recipe.accumulate=2", "student.recipe.ema=0.9"]
PLAIN_NET = ["~student.net", "+student.net={_target_: ddp_probe.plain_net, num_classes: 10, in_channels: 1}"]


@pytest.fixture(autouse=True)
def probes_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)


def composed(output: Path, *overrides: str) -> Cell:
    return Cell(compose([*SMALL, *overrides, f"paths.output_dir={output}", "logger=none"]))


def trained(output: Path, *overrides: str) -> Entry:
    return float_model(composed(output, *overrides))


def left(folder: Path, processes: int) -> list[dict[str, Any]]:
    assert len(list(folder.iterdir())) == processes
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("method", "target", "extra"),
    [
        ("dkd", "ProbedDKD", ["+data.mine=0", "data.split_seed=${data.mine}"]),  # a key that another one reads
        ("mixup", "ProbedMixup", ["method.per_sample=true"]),
        ("dml", "ProbedDML", [*CLIPPED, "+method.peer2={name: three, net: ${student.net}}"]),
    ],
)
def test_two_processes_train_what_one_does(method: str, target: str, extra: list[str], tmp_path: Path) -> None:
    """Equal to 1e-4 relative after six steps of 32 images: float32 sums in another order, and nothing else."""
    folders = {processes: tmp_path / f"probe{processes}" for processes in (1, 2)}
    overrides = [f"method={method}", f"method._target_=ddp_probe.{target}", *PLAIN_NET, *extra]
    one = trained(tmp_path, *overrides, f"+method.folder={folders[1]}", "trainer=cpu")
    two = trained(tmp_path, *overrides, f"+method.folder={folders[2]}", *TWO)
    (alone,), (first, second) = left(folders[1], 1), left(folders[2], 2)
    same(first["state"], second["state"], rtol=0, atol=0)
    same(first["state"], alone["state"], rtol=1e-4, atol=1e-6)
    same(one.weights(), two.weights(), rtol=1e-4, atol=1e-6)
    assert one.metrics["val_top1"] == two.metrics["val_top1"]
    # Every validation image once an epoch, over both processes together.
    assert alone["validated"] == first["validated"] + second["validated"] == 2 * 144
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["synchronised"]
    assert not any("teacher" in name or "average" in name for name in first["synchronised"])
    entries = [path.name for path in (tmp_path / "store").glob(f"digits-{method}-*")]
    learners = 1 + sum(name.startswith("key_") for name in one.metrics)  # the peers of dml lie beside its product
    assert len(entries) == 2 * learners
    assert not list((tmp_path / "store/.work").iterdir())


def test_two_processes_tune_what_one_does(tmp_path: Path) -> None:
    """Both round the same weights to the same codes, and learn the same scales."""
    folders = {processes: tmp_path / f"probe{processes}" for processes in (1, 2)}
    overrides = ["method=baseline", "quant=best", "quant.bits=2", "quant.act_bits=4", *PLAIN_NET]
    overrides += ["tune=qad", "tune._target_=ddp_probe.ProbedQAD", "tune.recipe.epochs=2", "tune.recipe.batch_size=32"]
    for processes, trainer in ((1, ["trainer=cpu"]), (2, TWO)):
        cell = composed(tmp_path, *overrides, *trainer, f"+tune.folder={folders[processes]}")
        (model,) = tuned_models(cell, planned(cell)).values()
        assert obtain(cell.store, model).metrics["epochs"] == 2
    (alone,), (first, second) = left(folders[1], 1), left(folders[2], 2)
    same(first["state"], second["state"], rtol=0, atol=0)
    same(first["state"], alone["state"], rtol=1e-4, atol=1e-6)
    assert any(name.endswith("scale") for name in first["synchronised"])
    assert not any("teacher" in name for name in first["synchronised"])


def test_a_sweep_over_processes_is_one_sweep(tmp_path: Path) -> None:
    """``kdq -m trainer=ddp``: the processes of a training train, and only the command itself sweeps.

    A callback that wants a logger has one in every process.
    """
    command = [sys.executable, "-m", "kdq", "-m", "method=baseline", "student.net.depth=8", "student.net.width=0.25"]
    command += [*SMALL, *TWO, "quant=none", "callbacks=lr_monitor", f"paths.output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    entries = sorted(path.name[:-17] for path in (tmp_path / "store").glob("digits-*"))
    assert entries == ["digits-baseline-resnet20-s0"]
    assert len(list((tmp_path / "rows").glob("*.json"))) == 1
    # W&B: student, quantize and the sweep, one run each, however many processes trained.
    runs = offline_runs(tmp_path)
    assert [run.run["job_type"] for run in runs] == ["distill", "quantize", "report"]
    assert [run.exit_code for run in runs] == [0] * 3
    assert [row["epoch"] for row in runs[0].history("val/top1")] == [0, 1]
    assert len(runs[0].history("train/images_per_second")) == 2
    metrics = json.loads(next((tmp_path / "store").glob("digits-baseline-*")).joinpath("metrics.json").read_text())
    assert metrics["processes"] == metrics["epochs"] == 2


def test_the_error_of_a_process_is_the_error_of_the_training(tmp_path: Path) -> None:
    with pytest.raises(KdqError, match=r"the loss became \S+ at epoch 0, by step \d"):
        trained(tmp_path, "method=baseline", *PLAIN_NET, *TWO, "student.recipe.lr=1e30")
    with pytest.raises(KdqError, match="batch_size=33 must be a multiple of 2 devices x 1 portions"):
        trained(tmp_path, "method=baseline", *PLAIN_NET, *TWO, "student.recipe.batch_size=33")


def test_a_process_ends_with_its_parent() -> None:
    """However the parent ends: here the pipe that it holds is closed."""
    code = "import kdq.train.processes as p, time; p.follow_parent()"
    child = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(600)"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=120) == 1


def test_counting_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    asked = [(1, 1), (3, 3), (-1, 4), ("auto", 4)]
    assert [count_devices(devices, "auto") for devices, _ in asked] == [count for _, count in asked]
    assert count_devices(8, "cpu") == 8
    assert count_devices(-1, "cpu") == 1
    with pytest.raises(KdqError, match="this machine has 4 GPUs"):
        count_devices(5, "auto")
    for devices in (0, [1], "two", True):
        with pytest.raises(
            KdqError, match="must be a number from 1 up, or auto; which GPUs, CUDA_VISIBLE_DEVICES says"
        ):
            count_devices(devices, "auto")


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_torchrun()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KdqError, match=r"torchrun started 2 processes.*run kdq without torchrun"):
        refuse_torchrun()


def test_devices_of_slurm_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a Slurm job Lightning would take ranks and world size from Slurm, and fail on one task for two."""
    assert "SLURM_NTASKS" not in os.environ
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "sweep")
    monkeypatch.setenv("SLURM_PROCID", "0")
    entry = trained(tmp_path, "method=baseline", *PLAIN_NET, "trainer=cpu", "student.recipe.epochs=1")
    assert entry.metrics["epochs"] == 1


def test_batchnorm_statistics_are_of_the_images_of_all_processes(tmp_path: Path) -> None:
    """One process sees images of mean 0, the other of mean 10: the network's running mean has both.

    Each normalises its own half of a batch; what is validated and kept has the mean of their statistics.
    """
    folder = tmp_path / "probe"
    trained(
        tmp_path,
        "method=baseline",
        "method._target_=ddp_probe.ProbedShift",
        f"+method.folder={folder}",
        *TWO,
        "~student.net",
        "+student.net={_target_: ddp_probe.normed_net, num_classes: 10, in_channels: 1}",
        "student.recipe.epochs=8",
    )
    first, second = left(folder, 2)
    same(first["state"], second["state"], rtol=0, atol=0)
    assert float(first["state"]["student.network.0.running_mean"]) == pytest.approx(5, abs=0.7)


def test_a_worker_that_does_not_hear_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    monkeypatch.setattr("kdq.train.slurm.PATIENCE", 0.2)
    worker.terminate()
    assert ended(worker) == -9
    worker.stdout.close()
