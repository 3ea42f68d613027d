"""FitNets: hints from the middle of the teacher (Romero et al. 2015, arXiv 1412.6550)."""

from collections.abc import Sequence

from torch import nn

from kdq.distill.feature_losses import hint_loss
from kdq.distill.features import FeatureMethod, regressor
from kdq.distill.options import number


class FitNets(FeatureMethod):
    """``CE + weight MSE(regressor(student), teacher)`` at the end of the middle stage.

    As in CRD's and mdistiller's comparisons the hint is there all through the training, beside the labels; the paper
    has a stage of its own for it. The regressor is a 1x1 convolution with BatchNorm, where channels differ.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> FitNets(student, teacher=teacher, num_classes=10).weight
    100.0
    """

    where = "middle"
    weight: float = number(100.0)
    loss = staticmethod(hint_loss)

    def projector(self, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
        if student[0] == teacher[0]:
            return nn.Identity()
        return regressor(student[0], teacher[0])
