"""Fixtures shared by all tests: real digits, tiny networks, and one thread a process."""

import os

# Several test processes share the cores; threads that wait for each other would only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from kdq.data.images import Images
from kdq.data.sets import digits

torch.set_num_threads(1)
# A submission is judged on the same examples every time; at home each run tries new ones.
settings.register_profile("ci", derandomize=True)
if "CI" in os.environ:
    settings.load_profile("ci")


def data_config(**changes: Any) -> dict[str, Any]:
    """The digits config as conf/data/digits.yaml has it."""
    return {
        "name": "digits",
        "num_classes": 10,
        "in_channels": 1,
        "mean": None,
        "std": None,
        "val_fraction": 0.1,
        "split_seed": 0,
        "train_limit": None,
        "test_limit": None,
        "augment": {"pad": 1, "flip": False, "cutout": 0},
    } | changes


@pytest.fixture(scope="session")
def images() -> Images:
    return Images(digits(), data_config())


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``kdq ARGUMENTS`` in this process below ``tmp_path``; returns exit code, standard output and error."""
    from hydra.core.global_hydra import GlobalHydra

    from kdq.cli.app import main

    def run(*arguments: str, command: str = "kdq") -> tuple[int, str, str]:
        own = [] if any(a.startswith("paths.output_dir=") for a in arguments) else [f"paths.output_dir={tmp_path}"]
        monkeypatch.setattr("sys.argv", [command, *arguments, *own])
        GlobalHydra.instance().clear()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


#: Of a network that images come to normalised in another way.
OWN_NORMALIZATION: dict[str, Any] = {"mean": [0.4] * 3, "std": [0.2] * 3, "data_mean": [0.5] * 3, "data_std": [0.3] * 3}
#: A network and a training small enough for a second.
TINY = (
    "logger=none",
    "model@teacher=resnet20",
    "teacher.net.width=0.25",
    "teacher.recipe.epochs=2",
    "model@student=resnet20",
    "student.net.depth=8",
    "student.net.width=0.25",
    "student.recipe.epochs=2",
    "data.train_limit=256",
    "quant.calibration_images=64",
)
