"""Teacher-free distillation (Yuan et al. 2020, arXiv 1909.11723): regularisation by a designed teacher."""

from torch import Tensor

from kdq.distill.logit_losses import designed_kl
from kdq.distill.losses import soft_cross_entropy
from kdq.distill.module import DistillationModule
from kdq.distill.options import number
from kdq.distill.progress import TrainingProgress


class TfKD(DistillationModule):
    """``(1 - alpha) CE + alpha KL(designed || student)``: the teacher is sure of the true class and finds the others
    alike. There is no network beside the student.

    >>> from kdq.models import CifarResNet
    >>> TfKD(CifarResNet(8, num_classes=10), num_classes=10).takes
    ()
    """

    alpha: float = number(0.1, high=1)  # the designed teacher's share of the loss
    correct: float = number(0.99, high=1)  # its probability of the true class
    temperature: float = number(20.0, 0.01)  # softens these probabilities

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        logits = self.student(images)
        ce = soft_cross_entropy(logits, labels, self.config.label_smoothing)
        kl = designed_kl(logits, labels, self.correct, self.temperature)
        return {"ce": (1 - self.alpha) * ce, "kl": self.alpha * kl}, logits
