"""Normalised distillation (Yang et al. 2023, arXiv 2303.13005)."""

from torch import Tensor

from kdq.distill.logit_losses import normalized_losses
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent


class NKD(TeacherStudent):
    """``CE - q_y log p_y + gamma T^2 CE(others)``: the target and the renormalised rest, apart.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> NKD(student, teacher=teacher, num_classes=10).gamma
    1.5
    """

    gamma: float = number(1.5)  # weight of the other classes' part
    temperature: float = number(1.0, 0.01)  # softens that part alone

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        target, others = normalized_losses(student, teacher, labels, self.temperature)
        return {"target": target, "others": self.gamma * others}
