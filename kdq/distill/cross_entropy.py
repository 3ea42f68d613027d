"""Plain cross-entropy training: the control every distillation method must beat, and how a teacher is made."""

from torch import Tensor

from kdq.distill.losses import soft_cross_entropy
from kdq.distill.module import DistillationModule
from kdq.distill.progress import TrainingProgress


class CrossEntropy(DistillationModule):
    """``CE(z_s, y)``, with ``config.label_smoothing``.

    >>> import torch
    >>> from kdq.models import CifarResNet
    >>> module = CrossEntropy(CifarResNet(depth=8, num_classes=10), num_classes=10)
    >>> module(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def losses(self, images: Tensor, labels: Tensor, progress: TrainingProgress) -> tuple[dict[str, Tensor], Tensor]:
        logits = self.student(images)
        return {"ce": soft_cross_entropy(logits, labels, self.config.label_smoothing)}, logits
