"""A training settles on a number of threads by its own steps; a number that the user gave stays."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdq.train import threads as probing
from kdq.train.threads import ThreadProbe
from kdq.utils import cpu

STEPS = 20


class Timed(L.LightningModule):
    """A step takes what ``seconds`` says, on the clock that the test moves; validation takes an hour."""

    def __init__(self, seconds: dict[int, float], clock: list[float], busy_from: int = 10**9) -> None:
        super().__init__()
        self.layer, self.seconds, self.clock, self.busy_from = nn.Linear(1, 1), seconds, clock, busy_from
        self.used: list[int] = []

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        threads = torch.get_num_threads()
        slow = 1 if threads == 1 or len(self.used) < self.busy_from else 100
        self.used.append(threads)
        self.clock[0] += self.seconds[threads] * slow
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.clock[0] += 3600

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two usable cores, nobody who says how many, and a clock of one's own."""
    before, now = torch.get_num_threads(), [0.0]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "usable_cores", lambda: 2)
    monkeypatch.setattr(probing, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now[0])}))
    yield now
    torch.set_num_threads(before)


def trained(module: Timed, probe: ThreadProbe, folder: Path, epochs: int = 5) -> list[int]:
    data = DataLoader(TensorDataset(torch.zeros(STEPS, 1)))
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[probe],
        logger=CSVLogger(folder, "", ""),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, data)
    assert len(module.used) == epochs * STEPS  # no step is added
    return module.used


@pytest.mark.parametrize(("seconds", "expected"), [({1: 1.0, 2: 0.6}, 2), ({1: 1.0, 2: 250.0}, 1)])
def test_a_training_goes_on_with_the_fastest_number(
    seconds: dict[int, float], expected: int, clock: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe = ThreadProbe()
    with caplog.at_level(logging.INFO, logger="kdq.train.threads"):
        used = trained(Timed(seconds, clock), probe, tmp_path)
    assert used[:2] == [1, 1]
    assert set(used[4 * cpu.ROUNDS :]) == {expected}
    assert torch.get_num_threads() == probe.threads == expected
    assert f"on {expected} of 2 CPU threads" in caplog.text
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/threads")
    assert [float(row.split(",")[column]) for row in rows if row.split(",")[column]] == [expected]


def test_a_training_whose_steps_become_far_longer_tries_again(clock: list[float], tmp_path: Path) -> None:
    used = trained(Timed({1: 1.0, 2: 0.6}, clock, busy_from=50), ThreadProbe(), tmp_path)
    assert set(used[20:50]) == {2}
    assert used[50:].count(2) == 2  # the one that was late, and one of the try
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("how", ["option", "environment", "one core"])
def test_a_number_that_is_given_stays(
    how: str, clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    elif how == "one core":
        torch.set_num_threads(1)
        monkeypatch.setattr(cpu, "usable_cores", lambda: 1)
    probe = ThreadProbe(2 if how == "option" else "auto")
    expected = 1 if how == "one core" else 2
    assert set(trained(Timed({1: 1.0, 2: 250.0}, clock), probe, tmp_path)) == {expected}
    assert probe.threads == torch.get_num_threads() == expected
    assert (
        "train/threads" not in (tmp_path / "metrics.csv").read_text() if (tmp_path / "metrics.csv").exists() else True
    )


def test_several_processes_try_nothing(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size, expected in ((2, 2), (1, 1)):  # one that tries begins with one thread
        torch.set_num_threads(2)
        probe = ThreadProbe()
        trainer = type("Several", (), {"world_size": world_size})
        probe.on_train_start(trainer, Timed({}, clock))  # type: ignore[arg-type]
        assert torch.get_num_threads() == expected
