"""Successive halving: the weak trainings of a search end early (asynchronously: Li et al. 2018, arXiv 1810.05934)."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from kdq.utils.errors import KdqError
from kdq.utils.files import regular, write_text


class SuccessiveHalving(Callback):
    """Ends a training that is behind the others of its search: after ``first`` epochs, ``factor`` times as many, and so
    on, one goes on if it is among the best of every ``factor`` that have come so far. None waits for others: the first
    to come goes on. One that is never ended has the weights that it would have had alone.

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> halving = SuccessiveHalving(folder="rungs", name="lr=0.1")
        >>> trainer = L.Trainer(callbacks=[halving], logger=False, accelerator="cpu")
        >>> trainer.fit(BoringModel())  # doctest: +SKIP
        >>> halving.stopped is None  # or the value at which it was ended
        True

    Args:
        folder: what the trainings of one search share, also those of other processes and machines: a file for each of
            them and each comparison.
        monitor, mode: the logged value that compares, ``max`` or ``min`` of it.
        first: epochs before the first comparison.
        factor: what the epochs grow by from one comparison to the next, of at least 2.
        name: tells this training from the others.

    Attributes:
        stopped: the value at which the training was ended, or None.

    Raises:
        KdqError: an argument is out of its range, or the value was not logged.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        monitor: str = "val/top1",
        mode: str = "max",
        first: int = 1,
        factor: int = 3,
        name: str = "",
    ) -> None:
        if first < 1 or factor < 2 or mode not in ("max", "min"):
            raise KdqError(f"first={first} must be at least 1, factor={factor} at least 2, mode={mode!r} max or min")
        self.folder, self.monitor, self.first, self.factor = folder, monitor, first, factor
        self.name = name or uuid4().hex
        self.sign = 1 if mode == "max" else -1
        self.stopped: float | None = None
        self._next = first

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.folder is None:
            raise KdqError("SuccessiveHalving needs the folder in which trainings are compared")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop |= self.stopped is not None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or epochs < self._next:
            return
        if self.monitor not in trainer.callback_metrics:
            raise KdqError(f"SuccessiveHalving compares {self.monitor}, which was not logged: give monitor=")
        value = float(trainer.callback_metrics[self.monitor])
        if epochs != trainer.max_epochs:
            # All processes do as the first one finds: to them, the files may be there a moment later.
            weak = trainer.is_global_zero and not self._among_the_best(value)
            if trainer.strategy.broadcast(weak):
                self.stopped, trainer.should_stop = value, True
        while self._next <= epochs:
            self._next *= self.factor

    def _among_the_best(self, value: float) -> bool:
        """Whether ``value`` is among the best of every ``factor`` at this comparison; it is kept there."""
        assert self.folder is not None
        write_text(Path(self.folder) / f"{self._next}-{self.name}", repr(value))
        found = [_value(file) for file in Path(self.folder).glob(f"{self._next}-*")]
        best = sorted((self.sign * each for each in found if each == each), reverse=True)  # nan is no value
        return self.sign * value in best[: max(1, len(best) // self.factor)]

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "stopped": self.stopped, "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.name, self.stopped, self._next = state_dict["name"], state_dict["stopped"], state_dict["next"]


def _value(file: Path) -> float:
    try:
        return float(regular(file).read_text())
    except (OSError, ValueError) as error:
        raise KdqError(f"{file} holds no value that a training had: delete it, and it is compared no more") from error
