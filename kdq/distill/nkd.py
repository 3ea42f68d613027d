"""Normalised distillation (Yang et al. 2023, arXiv 2303.13005)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.logit_losses import normalized_losses
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.utils.checks import within


class NKD(TeacherStudent):
    """``CE - q_y log p_y + gamma T^2 CE(others)``: the target and the renormalised rest, apart.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> NKD(student, teacher=teacher, num_classes=10).gamma
    1.5

    Args:
        gamma: weight of the other classes' part.
        temperature: softens that part alone.
        kwargs: of :class:`~kdq.distill.teacher_student.TeacherStudent`.
    """

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, temperature=temperature, **kwargs)
        self.gamma = within("method.gamma", gamma, 0)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        target, others = normalized_losses(student, teacher, labels, self.temperature)
        return {"target": target, "others": self.gamma * others}
