"""Methods and networks for tests/train/test_processes.py, importable by the processes of a training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdq.distill import CrossEntropy
from kdq.distill.dkd import DKD
from kdq.distill.dml import DML
from kdq.distill.mixup import Mixup
from kdq.distill.progress import TrainingProgress
from kdq.distill.qad import QAD


def plain_net(num_classes: int, in_channels: int) -> nn.Module:
    """No BatchNorm: the gradient of a batch is the mean of its parts' gradients."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6 * 9, num_classes)
    )


class Probe(CrossEntropy):
    """Every process leaves ``folder/<rank>.pt``: its final state, what DDP synchronises, what it validated."""

    def __init__(self, *args: Any, folder: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder, self.validated = Path(folder), 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.validated += len(batch[1])

    def on_train_end(self) -> None:
        wrapped = self.trainer.strategy.model
        names = [name for name, p in wrapped.named_parameters() if p.requires_grad]  # type: ignore[union-attr]
        self.folder.mkdir(exist_ok=True)
        left = {"state": self.state_dict(), "wrapped": type(wrapped).__name__, "synchronised": names}
        torch.save(left | {"validated": self.validated}, self.folder / f"{self.global_rank}.pt")


class ProbedDML(Probe, DML):
    pass


class ProbedDKD(Probe, DKD):
    pass


class ProbedMixup(Probe, Mixup):
    pass


class ProbedQAD(Probe, QAD):
    pass


def normed_net(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.Flatten(), nn.Linear(in_channels * 64, num_classes))


class ProbedShift(Probe):
    """Process n sees its training images with 10 n added."""

    def losses(self, images: Tensor, labels: Tensor, moment: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        return super().losses(images + 10.0 * moment.rank, labels, moment)
