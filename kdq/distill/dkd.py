"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""

from torch import Tensor

from kdq.distill.losses import decoupled_kl
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent


class DKD(TeacherStudent):
    """``CE + w (alpha TCKD + beta NCKD)`` with w rising linearly to 1.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> DKD(student, teacher=teacher, num_classes=10, beta=8.0).beta
    8.0
    """

    alpha: float = number(1.0)  # weight of the target class's part
    beta: float = number(2.0)  # weight of the other classes' part; the authors use 2 to 8
    warmup: float = number(0.0833, high=1)  # share of the training over which w rises; the authors' is 20 of 240 epochs

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        tckd, nckd = decoupled_kl(student, teacher, labels, self.temperature)
        weight = progress.ramp(self.warmup)
        return {"tckd": weight * self.alpha * tckd, "nckd": weight * self.beta * nckd}
