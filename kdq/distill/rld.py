"""Refined logit distillation (Sun et al. 2024, arXiv 2408.07703)."""

from torch import Tensor

from kdq.distill.logit_losses import refined_losses
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent


class RLD(TeacherStudent):
    """``CE + w (alpha SCD + beta MCD)`` with w rising linearly to 1: what a teacher that errs may still teach.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> RLD(student, teacher=teacher, num_classes=10).beta
    8.0
    """

    alpha: float = number(1.0)  # weight of the confidence in the true class
    beta: float = number(8.0)  # weight of the classes that the teacher ranks below it
    warmup: float = number(0.0833, high=1)  # share of the training over which w rises; the authors' is 20 of 240 epochs

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        scd, mcd = refined_losses(student, teacher, labels, self.temperature)
        weight = progress.ramp(self.warmup)
        return {"scd": weight * self.alpha * scd, "mcd": weight * self.beta * mcd}
