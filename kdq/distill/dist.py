"""DIST: correlations instead of divergences (Huang et al. 2022, arXiv 2205.10536)."""

from torch import Tensor

from kdq.distill.logit_losses import correlation_losses
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress
from kdq.distill.teacher_student import TeacherStudent


class DIST(TeacherStudent):
    """``CE + beta inter + gamma intra``: the student's probabilities need only correlate with the teacher's.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> DIST(student, teacher=teacher, num_classes=10).gamma
    1.0
    """

    beta: float = number(1.0)  # weight of the correlation over the classes of each sample
    gamma: float = number(1.0)  # weight of the correlation over the samples of each class

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        inter, intra = correlation_losses(student, teacher, self.temperature)
        return {"inter": self.beta * inter, "intra": self.gamma * intra}
