"""Probabilistic knowledge transfer (Passalis & Tefas 2018, arXiv 1803.10837)."""

from kdq.distill.feature_losses import pkt_loss
from kdq.distill.features import FeatureMethod
from kdq.distill.options import number


class PKT(FeatureMethod):
    """``CE + weight KL`` of the probabilities with which embeddings of a batch pick each other by similarity.

    >>> from kdq.models import CifarResNet
    >>> student, teacher = (CifarResNet(depth, num_classes=10) for depth in (8, 14))
    >>> PKT(student, teacher=teacher, num_classes=10).weight
    30000.0
    """

    where, maps = "embedding", False
    weight: float = number(30000.0)
    loss = staticmethod(pkt_loss)
