"""DIST: correlations instead of divergences (Huang et al. 2022, arXiv 2205.10536)."""

from typing import Any

from torch import Tensor, nn

from kdq.distill.checkpoint import Network
from kdq.distill.logit_losses import correlation_losses
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent
from kdq.utils.checks import within


class DIST(TeacherStudent):
    """``CE + beta inter + gamma intra``: the student's probabilities need only correlate with the teacher's.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> DIST(student, teacher=teacher, num_classes=10).gamma
    1.0

    Args:
        beta: weight of the correlation over the classes of each sample.
        gamma: weight of the correlation over the samples of each class.
        kwargs: of :class:`~kdq.distill.teacher_student.TeacherStudent`.
    """

    def __init__(
        self,
        student: Network,
        teacher: nn.Module | None = None,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, teacher, **kwargs)
        self.beta, self.gamma = within("method.beta", beta, 0), within("method.gamma", gamma, 0)

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        inter, intra = correlation_losses(student, teacher, self.temperature)
        return {"inter": self.beta * inter, "intra": self.gamma * intra}
