"""Overhauled feature distillation: features before their ReLUs (Heo et al. 2019, arXiv 1904.01866)."""

from collections.abc import Sequence

from torch import Tensor, nn

from kdq.distill.feature_losses import margin_loss
from kdq.distill.features import FeatureMethod, regressor
from kdq.distill.options import number


class OFD(FeatureMethod):
    """``CE + weight sum_stages 2^-(stages after it) partial(regressor(student), margin_relu(teacher))``, of what the
    ReLUs take that end the stages. A stage that ends with none is compared as it is.

    A channel's margin is the mean of its negative values in the batch; the authors' code estimates it from the last
    BatchNorm, which knows nothing of a shortcut added behind it.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> OFD(student, teacher=teacher, num_classes=10).weight
    0.001
    """

    where = "unactivated"
    weight: float = number(1e-3)

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        return regressor(student[0], teacher[0])

    def pair(self, student: Tensor, teacher: Tensor, layer: int) -> Tensor:
        return margin_loss(student, teacher) / 2 ** (len(self.projectors) - 1 - layer)
