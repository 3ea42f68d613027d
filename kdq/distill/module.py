"""Plain cross-entropy training: the control every distillation method must beat, and how a teacher is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from kdq.distill.config import TrainConfig
from kdq.distill.learner import Learner
from kdq.distill.losses import soft_cross_entropy
from kdq.distill.progress import TrainingProgress


class Baseline(L.LightningModule):
    """Trains ``student`` with cross-entropy. The other methods override :meth:`losses`.

    Args:
        student: the network, called on float images ``(batch, channels, height, width)``.
        recipe: optimizer, schedule and epochs.
        num_classes: classes of the data.
        seed: of the order of the images, their augmentation, and whatever else a method draws.
    """

    #: The networks that the method takes beside the student, as keyword arguments: ``teacher``, ``peer``.
    takes: tuple[str, ...] = ()

    def __init__(self, student: nn.Module, recipe: TrainConfig, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.recipe, self.num_classes, self.seed = recipe, num_classes, seed
        self.student = Learner(student, num_classes, recipe.ema)
        #: The last step's ``loss`` and its terms, of every learner, on the device.
        self.latest: dict[str, Tensor] = {}

    @property
    def learners(self) -> dict[str, Learner]:
        """The networks in training, by name. The first one's metrics have the plain names."""
        return {"student": self.student}

    def networks(self) -> list[nn.Module]:
        """Every network that a step runs, the frozen ones too: what ``trainer.compile`` compiles."""
        return [learner.network for learner in self.learners.values()]

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)

    def losses(self, images: Tensor, labels: Tensor, moment: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        """The named terms whose sum is minimised, and the student's logits."""
        logits = self.student(images)
        return {"ce": soft_cross_entropy(logits, labels, self.recipe.label_smoothing)}, logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        terms, logits = self.losses(*batch, self.moment(batch_idx))
        return self.total("student", terms, logits, batch[1])

    def moment(self, batch_idx: int) -> TrainingProgress:
        trainer = self.trainer
        steps = int(trainer.num_training_batches)
        return TrainingProgress(
            trainer.current_epoch, batch_idx, self.recipe.epochs, steps, trainer.global_rank, trainer.world_size
        )

    def total(self, name: str, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of one learner's ``terms``; what is logged of the step is kept, without waiting for the device."""
        loss = torch.stack(list(terms.values())).sum()
        learner, suffix = self.learners[name], self.suffix(name)
        learner.train_top1.update(logits.detach(), labels)
        self.latest |= {f"{term}{suffix}": value.detach() for term, value in {"loss": loss, **terms}.items()}
        return loss

    def on_train_epoch_end(self) -> None:
        for name, learner in self.learners.items():
            self.log(f"train/top1{self.suffix(name)}", learner.train_top1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.student.stepped()

    def on_validation_epoch_start(self) -> None:
        """Give all processes one network: BatchNorm statistics are each process's own, and their mean uses all."""
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        for name, learner in self.learners.items():
            logits, suffix = learner.eval_network(images), self.suffix(name)
            learner.val_top1.update(logits, labels)
            learner.val_loss.update(soft_cross_entropy(logits, labels), weight=len(labels))
            self.log(f"val/top1{suffix}", learner.val_top1, prog_bar=True)
            self.log(f"val/loss{suffix}", learner.val_loss)

    def last_validated(self, metric: str, name: str) -> float:
        """A learner's ``top1`` (0 to 1) or ``loss`` in the last validation."""
        return float(self.trainer.callback_metrics[f"val/{metric}{self.suffix(name)}"])

    def configure_optimizers(self) -> Any:
        # A trainer of a module that steps by hand accumulates nothing: it counts every batch as a step.
        batches = int(self.trainer.estimated_stepping_batches) * self.trainer.accumulate_grad_batches
        steps = batches // self.recipe.accumulate
        return [self._optimizer(learner, steps) for learner in self.learners.values()]

    def _optimizer(self, learner: Learner, steps: int) -> dict[str, Any]:
        optimizer = self.recipe.optimizer(learner.network.parameters())
        scheduler = {"scheduler": self.recipe.scheduler(optimizer, steps), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def suffix(self, name: str) -> str:
        """What a learner's metrics have behind their names."""
        return "" if name == next(iter(self.learners)) else f"_{name}"
