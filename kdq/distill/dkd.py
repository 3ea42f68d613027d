"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.losses import decoupled_kl
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.utils.checks import within


class DKD(TeacherStudent):
    """``CE + w (alpha TCKD + beta NCKD)`` with w rising linearly to 1.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> DKD(student, teacher=teacher, num_classes=10, beta=8.0).beta
    8.0

    Args:
        alpha: weight of the target class's part.
        beta: weight of the other classes' part; the authors use 2 to 8.
        warmup: the share of the training over which w rises, 0 to 1; the authors' is 20 of 240 epochs.
        kwargs: of :class:`~kdq.distill.teacher_student.TeacherStudent`.
    """

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 2.0,
        warmup: float = 0.0833,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        self.alpha, self.beta = within("method.alpha", alpha, 0), within("method.beta", beta, 0)
        self.warmup = within("method.warmup", warmup, 0, 1)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        tckd, nckd = decoupled_kl(student, teacher, labels, self.temperature)
        weight = progress.ramp(self.warmup)
        return {"tckd": weight * self.alpha * tckd, "nckd": weight * self.beta * nckd}
