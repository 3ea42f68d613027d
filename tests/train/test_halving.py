"""Successive halving against its rule, written down once more, and against trainings that nothing stops."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from kdq.stages.cell import Cell
from kdq.stages.train import float_model
from kdq.train.fit import fit
from kdq.train.halving import SuccessiveHalving
from kdq.utils.config import compose
from kdq.utils.errors import KdqError, StoppedTrialError
from tests.conftest import TINY
from tests.train.test_fit import RECIPES, TRAINER, module, small_images

#: What ten trainings of nine epochs have after the first one, in the order in which they come, and gain in each.
STARTS = [0.50, 0.40, 0.60, 0.55, 0.70, 0.10, 0.71, 0.69, 0.80, 0.05]
GAINS = [0.01, 0.01, 0.00, 0.01, 0.02, 0.30, 0.00, 0.01, 0.01, 0.01]


class Climbing(L.LightningModule):
    """Its value after each epoch is known."""

    def __init__(self, start: float, gain: float) -> None:
        super().__init__()
        self.start, self.gain, self.weight = start, gain, torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any) -> Any:
        return self.weight.sum()

    def validation_step(self, batch: Any) -> None:
        self.log("score", self.start + self.gain * self.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def epochs_of(halving: SuccessiveHalving, climbing: Climbing, folder: Path) -> int:
    trainer = L.Trainer(
        max_epochs=9, callbacks=[halving], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = DataLoader(torch.zeros(2, 1))
    trainer.fit(climbing, loader, loader)
    return trainer.current_epoch


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
@pytest.mark.parametrize(("first", "factor"), [(1, 3), (2, 2)])
def test_one_goes_on_if_fewer_than_its_share_are_better(
    mode: str, sign: int, first: int, factor: int, tmp_path: Path
) -> None:
    seen: dict[int, list[float]] = {}
    for i, (start, gain) in enumerate(zip(STARTS, GAINS, strict=True)):
        expected, at = 9, first
        while at < 9:
            value = float(torch.tensor(sign * (start + gain * (at - 1))))  # as it is logged
            seen.setdefault(at, []).append(value)
            better = sum(sign * other > sign * value for other in seen[at])
            if better >= max(1, len(seen[at]) // factor):
                expected = at
                break
            at *= factor
        halving = SuccessiveHalving(tmp_path, "score", mode, first, factor, f"trial {i}")
        assert epochs_of(halving, Climbing(sign * start, sign * gain), tmp_path) == expected
        assert (halving.stopped is None) == (expected == 9)
    assert {len(values) for values in seen.values()} != {len(STARTS)}  # some were stopped


def test_a_value_that_is_none_is_the_worst(tmp_path: Path) -> None:
    assert epochs_of(SuccessiveHalving(tmp_path, "score"), Climbing(float("nan"), 0), tmp_path) == 1
    assert epochs_of(SuccessiveHalving(tmp_path, "score"), Climbing(0.1, 0), tmp_path) == 9


@pytest.mark.parametrize(
    "wrong", [{"first": 0}, {"factor": 1}, {"mode": "maximize"}, {"monitor": "nothing"}, {"folder": None}]
)
def test_what_cannot_be_compared_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KdqError):
        epochs_of(SuccessiveHalving(**{"folder": tmp_path, "monitor": "score"} | wrong), Climbing(0, 0), tmp_path)


@pytest.mark.parametrize("held", [b"", b"best", b"\xff"])
def test_a_damaged_file_is_named(held: bytes, tmp_path: Path) -> None:
    (tmp_path / "1-other").write_bytes(held)
    with pytest.raises(KdqError, match=f"^{re.escape(str(tmp_path / '1-other'))} holds no value.*delete it"):
        epochs_of(SuccessiveHalving(tmp_path, "score"), Climbing(0.1, 0), tmp_path)


def test_one_that_goes_on_is_as_if_it_were_alone_and_a_stopped_one_stays_stopped(tmp_path: Path) -> None:
    def train(name: str, lr: float, *callbacks: Any) -> Any:
        trained = module("baseline", epochs=4, lr=lr)
        return fit(trained, small_images(), TRAINER, RECIPES[id(trained)], tmp_path / name, callbacks=callbacks)

    alone, _ = train("alone", 0.05)
    compared, metrics = train("first", 0.05, SuccessiveHalving(tmp_path / "rungs", name="first", factor=2))
    assert metrics["epochs"] == 4
    assert all(
        torch.equal(compared["student"].weights[name], value) for name, value in alone["student"].weights.items()
    )
    for _ in range(2):
        weak = SuccessiveHalving(tmp_path / "rungs", name="weak", factor=2)
        with pytest.raises(
            StoppedTrialError, match=r"stopped after 1 of 4 epochs: val/top1 .* every 2 of its search"
        ) as stopped:
            train("weak", 1e-6, weak, EarlyStopping("val/top1", mode="max", patience=9))
        assert stopped.value.value == weak.stopped


def test_optuna_is_told_of_a_stopped_trial_what_it_had(cli: Any, tmp_path: Path) -> None:
    arguments = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0", *TINY)
    arguments += ("method=baseline", "quant.bits=4", "student.recipe.lr=tag(log, interval(0.0001, 0.1))")
    arguments += ("callbacks=successive_halving", "student.recipe.epochs=4")
    code, _, err = cli(*arguments)
    assert code == 1
    assert "give kdq.objective=val_top1" in err
    code, _, err = cli(*arguments, "kdq.objective=val_top1")
    assert code == 0, err
    compared = [file.name for file in (tmp_path / "store" / "halving").glob("*/1-*")]
    assert len(compared) == 3
    rows = list((tmp_path / "rows").glob("*.json"))
    assert 1 <= len(rows) < 3
    logs = "".join(file.read_text() for file in tmp_path.glob("runs/*/*/*.log"))
    told = [float(each) for each in re.findall(r"stopped after 1 of 4 epochs: val/top1 ([\d.]+)", logs)]
    assert len(told) + len(rows) == 3
    assert not list((tmp_path / "failed").glob("*"))  # a search means it
    (result,) = tmp_path.glob("runs/*/optimization_results.yaml")
    assert OmegaConf.load(result).best_value >= 100 * max(told)


def test_a_teacher_is_not_compared_with_the_students_that_are_searched(tmp_path: Path) -> None:
    (tmp_path / "rungs").mkdir()
    (tmp_path / "rungs" / "1-perfect").write_text("1.0")
    halving = ["callbacks=successive_halving", f"callbacks.successive_halving.folder={tmp_path / 'rungs'}"]
    cell = Cell(compose([*TINY, "method=vkd", *halving, f"paths.output_dir={tmp_path}"]))
    with pytest.raises(StoppedTrialError, match=r"training vkd .* stopped after 1 of 2 epochs") as stopped:
        float_model(cell)
    (mine,) = (file for file in (tmp_path / "rungs").iterdir() if "perfect" not in file.name)
    assert float(mine.read_text()) == stopped.value.value
    (teacher,) = (tmp_path / "store").glob("digits-*")
    assert "baseline" in teacher.name


def test_two_processes_stop_together(tmp_path: Path) -> None:
    (tmp_path / "rungs").mkdir()
    (tmp_path / "rungs" / "1-perfect").write_text("1.0")
    halving = ["callbacks=successive_halving", f"callbacks.successive_halving.folder={tmp_path / 'rungs'}"]
    two = ["trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp"]
    cell = Cell(compose([*TINY, "method=baseline", *halving, *two, f"paths.output_dir={tmp_path}"]))
    with pytest.raises(StoppedTrialError, match="stopped after 1 of 2 epochs") as stopped:
        float_model(cell)
    assert len(list((tmp_path / "rungs").iterdir())) == 2
    assert 0 < stopped.value.value < 1
    assert not list((tmp_path / "store").glob("digits-*"))
