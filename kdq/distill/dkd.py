"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdq.distill.config import within
from kdq.distill.losses import decoupled_kl, soft_cross_entropy
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher import TeacherStudent


class DKD(TeacherStudent):
    """``CE + w (alpha TCKD + beta NCKD)`` with w rising linearly to 1.

    Args:
        alpha: weight of the target class's part.
        beta: weight of the other classes' part.
        warmup: the share of the training over which w rises, 0 to 1.
    """

    def __init__(self, *args: Any, alpha: float, beta: float, warmup: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.beta = within("method.alpha", alpha, 0), within("method.beta", beta, 0)
        self.warmup = within("method.warmup", warmup, 0, 1)

    def losses(self, images: Tensor, labels: Tensor, moment: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        logits = self.student(images)
        ce = soft_cross_entropy(logits, labels, self.recipe.label_smoothing)
        tckd, nckd = decoupled_kl(*self.comparable(logits, self.teacher(images)), labels, self.temperature)
        weight = min(1.0, moment.progress / self.warmup) if self.warmup > 0 else 1.0
        return {"ce": ce, "tckd": weight * self.alpha * tckd, "nckd": weight * self.beta * nckd}, logits
