"""Vanilla knowledge distillation (Hinton, Vinyals & Dean 2015, arXiv 1503.02531)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.losses import distillation_kl
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.utils.checks import within


class VKD(TeacherStudent):
    """``(1 - alpha) CE + alpha T^2 KL(teacher || student)``.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> VKD(student, teacher=teacher, num_classes=10).temperature
    4.0

    Args:
        alpha: the teacher's share of the loss.
        kwargs: of :class:`~kdq.distill.teacher_student.TeacherStudent`.
    """

    def __init__(
        self, student: Network, teacher: nn.Module | None = None, *, alpha: float = 0.9, **kwargs: Any
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        self.alpha = within("method.alpha", alpha, 0, 1)
        self.ce_weight = 1 - self.alpha

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        return {"kl": self.alpha * distillation_kl(student, teacher, self.tempered(progress))}

    def tempered(self, progress: TrainingProgress) -> float | Tensor:
        """The temperature of a batch."""
        return self.temperature
