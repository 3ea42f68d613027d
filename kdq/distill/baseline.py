"""Plain cross-entropy training: the control every distillation method must beat, and how a teacher is made."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from kdq.distill.losses import soft_cross_entropy
from kdq.distill.recipe import Recipe
from kdq.errors import KdqError


class Baseline(L.LightningModule):
    """Trains ``student`` with cross-entropy. The other methods override :meth:`losses`.

    Args:
        student: the network, called on float images ``(batch, channels, height, width)``.
        recipe: optimizer, schedule and epochs.
        num_classes: classes of the data.
    """

    #: Whether the method takes a trained teacher as its ``teacher`` argument.
    needs_teacher = False

    def __init__(self, student: nn.Module, recipe: Recipe, num_classes: int) -> None:
        super().__init__()
        self.student, self.recipe = student, recipe
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The named terms whose sum is minimised, and the student's logits."""
        logits = self.student(images)
        return {"ce": soft_cross_entropy(logits, labels, self.recipe.label_smoothing)}, logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        terms, logits = self.losses(*batch)
        loss = torch.stack(list(terms.values())).sum()
        self.stop_on_nan(loss, batch_idx)
        self.train_top1(logits, batch[1])
        self.log("train/loss", loss)
        self.log_dict({f"train/{name}": term for name, term in terms.items()})
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True)
        return loss

    def stop_on_nan(self, loss: Tensor, batch_idx: int) -> None:
        """Raise at the first loss that is not finite.

        Raises:
            KdqError: it says at which epoch and step, and what usually helps.
        """
        if not torch.isfinite(loss):
            raise KdqError(
                f"the loss became {loss.item()} at epoch {self.current_epoch}, step {batch_idx}: "
                f"lower the learning rate (recipe.lr={self.recipe.lr}) or set recipe.clip_grad=1"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.student(images)
        self.val_top1(logits, labels)
        self.val_loss(soft_cross_entropy(logits, labels), weight=len(labels))
        self.log("val/top1", self.val_top1, prog_bar=True)
        self.log("val/loss", self.val_loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.recipe.optimizer(self.student.parameters())
        scheduler = self.recipe.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}
