"""Multi-level logit distillation (Jin, Wang & Lin 2023, CVPR)."""

from torch import Tensor

from kdq.distill.logit_losses import level_losses
from kdq.distill.progress import TrainingProgress
from kdq.distill.vkd import VKD

#: Each prediction is compared at so many times ``temperature``: at 2, 3, 4, 5 and 6 by default.
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5)


class MLKD(VKD):
    """``(1 - alpha) CE + alpha sum_T (instance + batch + classes)`` over five temperatures around ``temperature``.

    The authors' code shows each image a second time, strongly augmented, and leaves out the half of the images and of
    the classes that the teacher is surest of; here a batch is seen once, and counts as a whole.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> MLKD(student, teacher=teacher, num_classes=10).alpha
    0.9
    """

    def terms(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: TrainingProgress) -> dict[str, Tensor]:
        levels = zip(*(level_losses(student, teacher, factor * self.temperature) for factor in FACTORS), strict=True)
        return {
            name: self.alpha * sum(parts) for name, parts in zip(("instance", "batch", "classes"), levels, strict=True)
        }
