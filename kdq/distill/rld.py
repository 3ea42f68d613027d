"""Refined logit distillation (Sun et al. 2024, arXiv 2408.07703)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.logit_losses import refined_losses
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.utils.checks import within


class RLD(TeacherStudent):
    """``CE + w (alpha SCD + beta MCD)`` with w rising linearly to 1: what a teacher that errs may still teach.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> RLD(student, teacher=teacher, num_classes=10).beta
    8.0

    Args:
        alpha: weight of the confidence in the true class.
        beta: weight of the classes that the teacher ranks below it.
        warmup: the share of the training over which w rises, 0 to 1; the authors' is 20 of 240 epochs.
        kwargs: of :class:`~kdq.distill.teacher_student.TeacherStudent`.
    """

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup: float = 0.0833,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        self.alpha, self.beta = within("method.alpha", alpha, 0), within("method.beta", beta, 0)
        self.warmup = within("method.warmup", warmup, 0, 1)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        scd, mcd = refined_losses(student, teacher, labels, self.temperature)
        weight = progress.ramp(self.warmup)
        return {"scd": weight * self.alpha * scd, "mcd": weight * self.beta * mcd}
