"""Vanilla knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdq.distill.baseline import Baseline
from kdq.distill.frozen import Frozen
from kdq.distill.losses import distillation_kl, soft_cross_entropy


class VKD(Baseline):
    """``(1 - alpha) CE + alpha T^2 KL(teacher || student)``.

    Args:
        teacher: the trained network; it is frozen, and the student's checkpoint does not hold it.
        alpha: the teacher's share of the loss.
        temperature: softens both distributions.
    """

    needs_teacher = True

    def __init__(self, *args: Any, teacher: nn.Module, alpha: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.alpha, self.temperature = Frozen(teacher), alpha, temperature

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        logits = self.student(images)
        ce = soft_cross_entropy(logits, labels, self.recipe.label_smoothing)
        kl = distillation_kl(logits, self.teacher(images), self.temperature)
        return {"ce": (1 - self.alpha) * ce, "kl": self.alpha * kl}, logits
