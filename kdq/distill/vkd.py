"""Vanilla knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""

from torch import Tensor

from kdq.distill.losses import distillation_kl
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent


class VKD(TeacherStudent):
    """``(1 - alpha) CE + alpha T^2 KL(teacher || student)``.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> VKD(student, teacher=teacher, num_classes=10).temperature
    4.0
    """

    alpha: float = number(0.9, high=1)  # the teacher's share of the loss

    @property
    def ce_weight(self) -> float:  # type: ignore[override]
        return 1 - self.alpha

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        return {"kl": self.alpha * distillation_kl(student, teacher, self.tempered(progress))}

    def tempered(self, progress: TrainingProgress) -> float | Tensor:
        return self.temperature
