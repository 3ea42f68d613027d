"""Attention transfer (Zagoruyko & Komodakis 2017, arXiv 1612.03928)."""

from kdq.distill.feature_losses import attention_loss
from kdq.distill.features import FeatureMethod
from kdq.distill.options import number


class AT(FeatureMethod):
    """``CE + weight sum_stages MSE(attention(student), attention(teacher))`` at the ends of the stages.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> AT(student, teacher=teacher, num_classes=10).weight
    1000.0
    """

    weight: float = number(1000.0)
    loss = staticmethod(attention_loss)
