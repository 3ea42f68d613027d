"""Transformed teacher matching (Zheng & Yang 2024, arXiv 2402.11148)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.logit_losses import transformed_kl
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.utils.checks import flag, within


class TTM(TeacherStudent):
    """``CE + weight KL(q || p)`` with the teacher alone softened: ``q`` is its probabilities to a power, renormalised.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> TTM(student, teacher=teacher, num_classes=10).temperature
    10.0

    Args:
        weight: of the divergence.
        temperature: the teacher's; the power is one over it.
        weighted: count samples by how smooth the teacher is there (WTTM).
        kwargs: of :class:`~kdq.distill.teacher_student.TeacherStudent`.
    """

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        weight: float = 45.0,
        temperature: float = 10.0,
        weighted: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, temperature=temperature, **kwargs)
        self.weight, self.weighted = within("method.weight", weight, 0), flag("method.weighted", weighted)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        return {"kl": self.weight * transformed_kl(student, teacher, self.temperature, self.weighted)}
