"""Vanilla knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdq.distill.config import within
from kdq.distill.losses import distillation_kl, soft_cross_entropy
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher import TeacherStudent


class VKD(TeacherStudent):
    """``(1 - alpha) CE + alpha T^2 KL(teacher || student)``.

    Args:
        alpha: the teacher's share of the loss.
    """

    def __init__(self, *args: Any, alpha: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = within("method.alpha", alpha, 0, 1)

    def losses(self, images: Tensor, labels: Tensor, moment: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        """``labels`` are indices ``(batch,)`` or probabilities ``(batch, classes)``."""
        logits = self.student(images)
        ce = soft_cross_entropy(logits, labels, self.recipe.label_smoothing)
        kl = distillation_kl(*self.comparable(logits, self.teacher(images)), self.temperature)
        return {"ce": (1 - self.alpha) * ce, "kl": self.alpha * kl}, logits
