"""Similarity-preserving distillation (Tung & Mori 2019, arXiv 1907.09682)."""

from kdq.distill.feature_losses import similarity_loss
from kdq.distill.features import FeatureMethod
from kdq.distill.options import number


class SP(FeatureMethod):
    """``CE + weight MSE(similarities(student), similarities(teacher))`` of the batch, at the end of the last stage.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> SP(student, teacher=teacher, num_classes=10).weight
    3000.0
    """

    where, maps = "last", False
    weight: float = number(3000.0)
    loss = staticmethod(similarity_loss)
