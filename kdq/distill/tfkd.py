"""Teacher-free distillation (Yuan et al. 2020, arXiv 1909.11723): regularisation by a designed teacher."""

from typing import Any

from torch import Tensor

from kdq.distill.checkpoint import Network
from kdq.distill.logit_losses import designed_kl
from kdq.distill.losses import soft_cross_entropy
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress
from kdq.utils.checks import within


class TfKD(DistillationModule):
    """``(1 - alpha) CE + alpha KL(designed || student)``: the teacher is sure of the true class and finds the others
    alike. There is no network beside the student.

    >>> from kdq.models import CifarResNet
    >>> TfKD(CifarResNet(8, num_classes=10), num_classes=10).takes
    ()

    Args:
        alpha: the designed teacher's share of the loss.
        correct: its probability of the true class.
        temperature: softens these probabilities.
        kwargs: of :class:`~kdq.distill.module.DistillationModule`.
    """

    def __init__(
        self, student: Network, *, alpha: float = 0.1, correct: float = 0.99, temperature: float = 20.0, **kwargs: Any
    ) -> None:
        super().__init__(student, **kwargs)
        self.alpha, self.correct = within("method.alpha", alpha, 0, 1), within("method.correct", correct, 0, 1)
        self.temperature = within("method.temperature", temperature, 0.01)

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        logits = self.student(images)
        ce = soft_cross_entropy(logits, labels, self.config.label_smoothing)
        kl = designed_kl(logits, labels, self.correct, self.temperature)
        return {"ce": (1 - self.alpha) * ce, "kl": self.alpha * kl}, logits
