"""Neuron selectivity transfer (Huang & Wang 2017, arXiv 1707.01219)."""

from kdq.distill.feature_losses import selectivity_loss
from kdq.distill.features import FeatureMethod
from kdq.distill.options import number


class NST(FeatureMethod):
    """``CE + weight sum_stages MMD^2`` between the channels of student and teacher, at the ends of the stages.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> NST(student, teacher=teacher, num_classes=10).weight
    50.0
    """

    weight: float = number(50.0)
    loss = staticmethod(selectivity_loss)
