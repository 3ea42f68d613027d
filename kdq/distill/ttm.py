"""Transformed teacher matching (Zheng & Yang 2024, arXiv 2402.11148)."""

from torch import Tensor

from kdq.distill.logit_losses import transformed_kl
from kdq.distill.options import number, switch
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent


class TTM(TeacherStudent):
    """``CE + weight KL(q || p)`` with the teacher alone softened: ``q`` is its probabilities to a power, renormalised.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> TTM(student, teacher=teacher, num_classes=10).temperature
    10.0
    """

    weight: float = number(45.0)  # of the divergence
    temperature: float = number(10.0, 0.01)  # the teacher's; the power is one over it
    weighted: bool = switch()  # count samples by how smooth the teacher is there (WTTM)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        return {"kl": self.weight * transformed_kl(student, teacher, self.temperature, self.weighted)}
